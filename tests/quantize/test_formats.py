"""The contract of every number format, found by file name: a new one is tested without touching this file."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vdit_quant.quantize import formats, registry
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.format import Format, ScalarFormat, Tensors, quantize_activation
from vdit_quant.quantize.spec import FormatSpec, LayerSpec

Ratio = Callable[[Tensor, Tensor], float]


def _specs(k: int) -> list[FormatSpec]:
    """Every format with every granularity that fits rows of `k`."""
    out = []
    for name in registry.names(formats):
        for group in registry.find(formats, name, "FORMAT").group_sizes:
            spec = FormatSpec(name, group)
            try:
                spec.resolve().check(k, spec)
            except InputError:
                continue
            out.append(spec)
    return out


def _label(spec: object) -> str | None:
    return f"{spec.format}-g{spec.group_size}" if isinstance(spec, FormatSpec) else None


SHAPES = [(1, 128), (5, 128), (64, 256), (3, 384)]
CASES = [(spec, n, k) for n, k in SHAPES for spec in _specs(k)]
every = pytest.mark.parametrize("fmt_spec", _specs(128), ids=_label)


def _weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def _bits(fmt: Format, n: int, k: int, spec: FormatSpec) -> float:
    return 8 * sum(t.nbytes for t in fmt.layout(n, k, spec).values()) / (n * k)


def _round_trip(weight: Tensor, spec: FormatSpec) -> Tensor:
    fmt = spec.resolve()
    return fmt.decode(fmt.encode(weight, spec), weight.shape[1], spec)


@pytest.mark.parametrize("name", registry.names(formats))
def test_tags_are_unique_and_some_granularity_fits_common_widths(name: str) -> None:
    tags = [registry.find(formats, other, "FORMAT").tag for other in registry.names(formats)]
    assert tags.count(registry.find(formats, name, "FORMAT").tag) == 1
    assert any(spec.format == name for spec in _specs(1152))


@pytest.mark.parametrize(("fmt_spec", "n", "k"), CASES, ids=_label)
def test_encode_gives_what_layout_promises(fmt_spec: FormatSpec, n: int, k: int) -> None:
    fmt = fmt_spec.resolve()
    tensors = fmt.encode(_weight(n, k), fmt_spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (layout.shape, layout.dtype) for name, layout in fmt.layout(n, k, fmt_spec).items()
    }
    decoded = fmt.decode(tensors, k, fmt_spec)
    assert decoded.shape == (n, k)
    assert decoded.dtype == torch.float32


@every
def test_encoding_again_loses_next_to_nothing(fmt_spec: FormatSpec, sqnr: Ratio) -> None:
    weight = _weight(32, 128)
    once = _round_trip(weight, fmt_spec)
    twice = _round_trip(once, fmt_spec)
    if fmt_spec.group_size is None and isinstance(fmt_spec.resolve(), ScalarFormat):
        torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6)
    else:  # scales of groups may be rounded themselves, and are fitted to slightly different maxima, as codebooks are
        assert sqnr(twice, once) > sqnr(once, weight) + 6
        assert sqnr(twice, weight) > sqnr(once, weight) - 0.5


@every
def test_the_error_is_bounded_by_the_bits(fmt_spec: FormatSpec, sqnr: Ratio) -> None:
    weight = _weight(64, 128)
    bits = min(_bits(fmt_spec.resolve(), 64, 128, fmt_spec), 10.0)
    # a normal row's best uniform quantiser gives 6 dB a bit less about 4 + log of the range; leave 5 dB on top
    least = 5.2 * bits - 8
    stored = fmt_spec.resolve().layout(64, 128, fmt_spec)["weight"].dtype
    if stored.is_floating_point:  # a float spends bits on its range: at worst it errs by eps / 2, evenly spread
        least = min(least, -20 * math.log10(torch.finfo(stored).eps / 12**0.5))
    assert sqnr(_round_trip(weight, fmt_spec), weight) > least


@every
def test_encoding_does_not_change_its_input(fmt_spec: FormatSpec) -> None:
    weight = _weight(8, 128)
    before = weight.clone()
    _round_trip(weight, fmt_spec)
    assert torch.equal(weight, before)


@every
def test_rows_are_independent(fmt_spec: FormatSpec) -> None:
    weight = _weight(9, 128)
    if {layout.shape[0] for layout in fmt_spec.resolve().layout(9, 128, fmt_spec).values()} != {9}:
        pytest.skip("the format shares a table between rows")
    alone = torch.cat([_round_trip(row[None], fmt_spec) for row in weight])
    assert torch.equal(alone, _round_trip(weight, fmt_spec))


@every
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_scaling_a_matrix_scales_its_code(fmt_spec: FormatSpec, scale: float, sqnr: Ratio) -> None:
    weight = _weight(16, 128)
    base, scaled = sqnr(_round_trip(weight, fmt_spec), weight), _round_trip(weight * scale, fmt_spec) / scale
    assert torch.isfinite(scaled).all()
    assert sqnr(scaled, weight) > base - 1


@every
def test_zero_rows_stay_zero_and_finite(fmt_spec: FormatSpec) -> None:
    weight = _weight(4, 128)
    weight[1] = 0
    weight[2, 64:] = 0
    decoded = _round_trip(weight, fmt_spec)
    assert torch.isfinite(decoded).all()
    assert not decoded[1].any()
    assert not _round_trip(torch.zeros(3, 128), fmt_spec).any()


@every
@pytest.mark.parametrize("size", [1e3, -1e3])
def test_one_huge_element_keeps_its_own_size_and_spoils_no_other_row(fmt_spec: FormatSpec, size: float) -> None:
    weight = _weight(4, 128)
    clean = _round_trip(weight, fmt_spec)
    weight[2, 5] = size
    decoded = _round_trip(weight, fmt_spec)
    assert torch.isfinite(decoded).all()
    assert abs(float(decoded[2, 5]) / size - 1) < 0.15
    if all(layout.shape[0] == 4 for layout in fmt_spec.resolve().layout(4, 128, fmt_spec).values()):
        assert torch.equal(decoded[[0, 1, 3]], clean[[0, 1, 3]])


@every
def test_a_lower_precision_input_is_accepted(fmt_spec: FormatSpec) -> None:
    weight = _weight(8, 128).bfloat16()
    torch.testing.assert_close(_round_trip(weight, fmt_spec), _round_trip(weight.float(), fmt_spec))


@every
def test_decoding_follows_the_tensors_device(fmt_spec: FormatSpec) -> None:
    fmt = fmt_spec.resolve()
    tensors: Tensors = {name: t.to("meta") for name, t in fmt.encode(_weight(8, 128), fmt_spec).items()}
    assert fmt.decode(tensors, 128, fmt_spec).device.type == "meta"


@pytest.mark.gpus(2)
@every
def test_a_gpu_that_is_not_the_current_one_decodes_the_same(fmt_spec: FormatSpec) -> None:
    fmt, found = fmt_spec.resolve(), []
    for device in ("cuda:0", "cuda:1"):
        tensors: Tensors = fmt.encode(_weight(8, 128).to(device), fmt_spec)
        found.append(fmt.decode(tensors, 128, fmt_spec).cpu())
    assert torch.equal(*found)


@every
def test_a_group_that_does_not_fit_says_what_would(fmt_spec: FormatSpec) -> None:
    fmt = fmt_spec.resolve()
    with pytest.raises(InputError, match=r"group size 7 is not supported \(known: "):
        fmt.check(128, FormatSpec(fmt_spec.format, 7))
    if fmt_spec.group_size is not None:
        found = f"{fmt_spec.group_size} does not divide K = {fmt_spec.group_size + 1}"
        with pytest.raises(InputError, match=found) as error:
            fmt.check(fmt_spec.group_size + 1, fmt_spec)
        assert ("one scale per row" in str(error.value)) == (None in fmt.group_sizes)


@every
def test_packing_is_undone_exactly(fmt_spec: FormatSpec) -> None:
    fmt, weight = fmt_spec.resolve(), _weight(6, 128)
    if not isinstance(fmt, ScalarFormat):
        pytest.skip("not rounded element by element")
    whole = fmt.quantize(weight, fmt.fit(weight, fmt_spec), fmt_spec)
    assert torch.equal(fmt.unpack(fmt.pack(whole), 128), whole)


@every
def test_rounding_goes_to_the_nearest_level(fmt_spec: FormatSpec) -> None:
    fmt, weight = fmt_spec.resolve(), _weight(6, 128)
    if not isinstance(fmt, ScalarFormat):
        pytest.skip("not rounded element by element")
    scales = fmt.fit(weight, fmt_spec)
    try:
        levels = fmt.levels(scales, fmt_spec)
    except NotImplementedError:
        pytest.skip("the format lists no levels")
    group = fmt_spec.group_size or 128
    table = levels.repeat_interleave(group, 1)  # [N, K, L]
    best = (table - weight[..., None]).abs().amin(-1)
    error = (fmt.decode(fmt.encode(weight, fmt_spec), 128, fmt_spec) - weight).abs()
    torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-6)
    assert (levels.diff(dim=-1) >= 0).all(), "levels must ascend"


def test_no_activation_format_leaves_the_input_alone() -> None:
    x = _weight(4, 128)
    assert quantize_activation(x, None) is x
    quantised = quantize_activation(x.bfloat16(), FormatSpec("int8"))
    assert quantised.dtype == torch.bfloat16
    assert 0 < float((quantised.float() - x).abs().max()) < 0.05


@every
@pytest.mark.parametrize("sign", [1, -1])
def test_activations_next_to_the_largest_number_of_float16_stay_finite(fmt_spec: FormatSpec, sign: int) -> None:
    """Rounding up leads beyond it, and so does the gain of a row."""
    top = torch.finfo(torch.float16).max
    even = torch.rand(32, 128, generator=torch.Generator().manual_seed(0))
    # evenly spread; nearly all next to the largest; nearly all far below it
    x = (torch.cat((even, even.pow(0.1), even.pow(10))) * top * sign).half()
    x[:, 5] = top * sign
    quantised = quantize_activation(x, fmt_spec)
    assert quantised.dtype == torch.float16
    assert torch.isfinite(quantised).all()
    wide = quantize_activation(x.float(), fmt_spec)
    assert torch.equal(quantised, wide.clamp(-top, top).half())
    assert float(quantised[:, 5].abs().float().mean()) > 0.4 * top


@pytest.mark.parametrize("name", ["e2m1", "mxfp4", "int8", "fp8"])
def test_an_activation_that_is_infinite_does_not_become_finite(name: str) -> None:
    spec = FormatSpec(name, {"mxfp4": 32}.get(name))
    x = _weight(2, 128).half()
    x[1, 7] = torch.inf
    quantised = quantize_activation(x, spec)
    assert torch.isfinite(quantised[0]).all()
    assert not torch.isfinite(quantised[1]).all()


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 6), k=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_int4_packing_is_exact_for_every_width(n: int, k: int, seed: int) -> None:
    fmt: ScalarFormat = registry.find(formats, "int4", "FORMAT")
    codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = fmt.pack(codes)
    assert packed.shape == (n, (k + 1) // 2)
    assert torch.equal(fmt.unpack(packed, k), codes)


@settings(deadline=None, max_examples=30)
@given(k=st.integers(1, 40).map(lambda i: 16 * i), seed=st.integers(0, 2**31), spread=st.floats(0, 6))
def test_int4_groups_decode_to_int8_levels_of_one_row_scale(k: int, seed: int, spread: float) -> None:
    spec = FormatSpec("int4", 16)
    fmt = spec.resolve()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, k, generator=generator) * torch.exp(torch.randn(4, k, generator=generator) * spread)
    tensors = fmt.encode(weight, spec)
    level = fmt.decode(tensors, k, spec) / tensors["weight_scale"][:, None]
    torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-3)
    assert float(level.abs().max()) <= 127.5


class Waits(TorchDispatchMode):
    """Notes what a CUDA graph cannot capture: tensors made from host values, and values read back."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("lift_fresh", "lift_fresh_copy", "_local_scalar_dense", "is_nonzero"):
            self.found.append(str(func))
        return func(*args, **kwargs or {})


@every
@pytest.mark.parametrize("as_activation", [False, True])
def test_a_layer_never_waits_for_the_device(fmt_spec: FormatSpec, as_activation: bool) -> None:
    if as_activation and fmt_spec.format in ("fp4", "vq2", "vq3"):
        pytest.skip("runs without CUDA graphs as an activation format, which is logged")
    weight = FormatSpec("int4", 64) if as_activation else fmt_spec
    spec = LayerSpec(weight, fmt_spec if as_activation else None)
    tensors, x = weight.resolve().encode(_weight(8, 128), weight), _weight(4, 128, 1)
    weight.resolve().linear(x, tensors, spec, None)  # tables are made once
    with Waits() as waits:
        weight.resolve().linear(x, tensors, spec, None)
    assert waits.found == []
