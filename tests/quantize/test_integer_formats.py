"""The integer formats with two-level scales: decoding, levels, clipping, products, and error-feedback rounding."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels.packed_decode import packed_to_int8
from vdit_quant.quantize.format import ScalarFormat, quantize_activation, row_gain
from vdit_quant.quantize.gptq import gptq
from vdit_quant.quantize.integer import GroupedInteger
from vdit_quant.quantize.layer import run_layer
from vdit_quant.quantize.spec import FormatSpec, LayerSpec

FORMATS = ("int2", "int3", "int4", "int6")
PACKED = ("int2", "int3", "int6")
GROUPS = (None, 16, 32, 64, 128)
each = pytest.mark.parametrize("name", FORMATS)
grouped = pytest.mark.parametrize("group", GROUPS)

# SHA-256 of what int4 has always stored and decoded for `_fixed`.
GOLDEN = {
    None: "6ebb1189e647658227d59cd9cf613f69c085da33676297944271dcfdfc479435",
    16: "826040ead4bf61bd735772447d540017ce2f7f7d58b8c7141419d45778f808e6",
    32: "fb6c419d421f5d84a64e14a7e759636744351760bd8f4092fdb61804451b2f15",
    64: "99e77096ead7710e5fa8b4305fcb7925940148f560cb60926b5eddebf593ef89",
    128: "bf728c9b3f95f9a87e814d34dca723acbe50d99d9aeff26cda543f32607a7d9a",
}


def _format(name: str) -> GroupedInteger:
    fmt = FormatSpec(name).resolve()
    assert isinstance(fmt, GroupedInteger)
    return fmt


def _weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def _fixed() -> Tensor:
    """A matrix made without random numbers: sizes that vary by column, a zero row and a zero group."""
    w = (torch.arange(48 * 384) * 7919 % 10007 - 5003).reshape(48, 384).float() / 4096
    w = w * (1 + torch.arange(384) % 37).float() / 16
    w[3] = 0
    w[5, 64:128] = 0
    return w


def _round_trip(fmt: ScalarFormat, weight: Tensor, spec: FormatSpec) -> Tensor:
    return fmt.decode(fmt.encode(weight, spec), weight.shape[1], spec)


@grouped
def test_int4_stores_what_it_always_did(group: int | None) -> None:
    spec, weight, digest = FormatSpec("int4", group), _fixed(), hashlib.sha256()
    fmt = _format("int4")
    for clip in (None, 0.8125):
        scales = fmt.fit(weight, spec) if clip is None else fmt.fit(weight, spec, clip)
        tensors = fmt.store(fmt.quantize(weight, scales, spec), scales)
        tensors |= {"_dec": fmt.decode(tensors, 384, spec), "_lev": fmt.levels(scales, spec)}
        for key in sorted(tensors):
            digest.update(key.encode())
            digest.update(tensors[key].contiguous().numpy().tobytes())
    assert digest.hexdigest() == GOLDEN[group]


@grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int4_activations_are_what_the_format_makes_of_a_weight(group: int | None, dtype: torch.dtype) -> None:
    """The op against `fit`, `quantize` and `dequantize`."""
    fmt, spec = _format("int4"), FormatSpec("int4", group)
    x = _weight(96, 384) * torch.exp(2 * _weight(96, 24, 1)).repeat_interleave(16, 1)
    x = torch.cat((x, x * 1e-4, x.abs(), -x.abs(), _fixed())).to(dtype)
    scales = fmt.fit(x, spec)
    packed = fmt.quantize(x.float(), scales, spec)
    codes, scale = fmt.quantize_rows(x, spec)
    assert torch.equal(codes.float(), fmt.dequantize(packed, {**scales, "weight_scale": torch.ones(len(x))}, spec))
    gain = row_gain(x, fmt.dequantize(packed, scales, spec))
    torch.testing.assert_close(scale, scales["weight_scale"] * gain, rtol=1e-6, atol=0)
    assert fmt.row_ops(spec) == ("quant_token_int4",)


@each
def test_every_code_with_every_group_scale_decodes_by_the_formula(name: str) -> None:
    fmt, spec = _format(name), FormatSpec(name, 64)
    bits = fmt.bits
    codes = (torch.arange(64) % (1 << bits) - (1 << (bits - 1))).to(torch.int8).repeat(256, 1)
    table = torch.arange(256, dtype=torch.uint8)[:, None]
    value = codes.long() * 2 + 1 if name == "int2" else codes.long()
    shift = bits + (name == "int2")
    want = (value * table.long() + (1 << (shift - 1))) >> shift
    assert int(want.abs().max()) == (96 if name == "int2" else 127)
    scales = {"weight_scale": torch.ones(256), "weight_group_scale": table}
    assert torch.equal(fmt.dequantize(codes, scales, spec), want.float())
    assert torch.equal(fmt.decode(fmt.store(codes, scales), 64, spec), want.float())
    if name in PACKED:
        assert torch.equal(packed_to_int8(fmt.pack(codes), table, 64, bits, fmt.odd).long(), want)


@each
@grouped
def test_levels_ascend_and_rounding_finds_the_nearest(name: str, group: int | None) -> None:
    fmt, spec, weight = _format(name), FormatSpec(name, group), _weight(9, 256)
    weight *= torch.exp(2 * _weight(9, 16, 1)).repeat_interleave(16, 1)
    scales = fmt.fit(weight, spec)
    levels = fmt.levels(scales, spec)
    assert levels.shape == (9, 256 // (group or 256), 1 << fmt.bits)
    assert (levels.diff(dim=-1) >= 0).all()
    codes = fmt.quantize(weight, scales, spec)
    table = levels.repeat_interleave(group or 256, 1)
    decoded = fmt.dequantize(codes, scales, spec)
    assert torch.equal(table.gather(-1, fmt.index_of(codes)[..., None])[..., 0], decoded)
    assert torch.equal(fmt.codes_of(fmt.index_of(codes)), codes)
    best = (table - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((decoded - weight).abs(), best, rtol=1e-5, atol=1e-6 * float(weight.abs().max()))


@each
def test_bits_per_weight(name: str) -> None:
    fmt, bits = _format(name), int(name.removeprefix("int"))

    def stored(k: int, group: int | None) -> float:
        return 8 * sum(t.nbytes for t in fmt.layout(384, k, FormatSpec(name, group)).values()) / (384 * k)

    assert stored(1152, 64) == pytest.approx(bits + 8 / 64 + 32 / 1152)
    assert stored(1152, None) == pytest.approx(bits + 32 / 1152)
    assert LayerSpec.parse(f"w{bits}g64-a8tok") == LayerSpec(FormatSpec(name, 64), FormatSpec("int8"))


@pytest.mark.parametrize(("name", "least"), [("int2", 9.1), ("int3", 14.0), ("int4", 19.7), ("int6", 32.0)])
def test_error_on_a_gaussian_weight(name: str, least: float, sqnr: Callable[[Tensor, Tensor], float]) -> None:
    weight = _weight(384, 1152)
    assert sqnr(_round_trip(_format(name), weight, FormatSpec(name, 64)), weight) > least


@pytest.mark.parametrize("name", ["int2", "int3"])
@grouped
def test_the_clip_is_the_best_constant_for_a_gaussian_weight(name: str, group: int | None) -> None:
    fmt, spec, weight = _format(name), FormatSpec(name, group), _weight(256, 1152, 3)

    def error(clip: float | None) -> float:
        scales = fmt.fit(weight, spec, clip)
        return float((fmt.dequantize(fmt.quantize(weight, scales, spec), scales, spec) - weight).square().sum())

    best = min(error(i / 100) for i in range(35, 101, 5))
    assert error(fmt.clip[group]) < 1.005 * best
    assert error(None) < 1.005 * best


@pytest.mark.parametrize("name", ["int2", "int3"])
@grouped
def test_a_group_on_the_grid_or_with_one_element_is_not_clipped(name: str, group: int | None) -> None:
    fmt, spec = _format(name), FormatSpec(name, group)
    lone = _weight(4, 128) * 1e-3
    lone[:, ::16] = 7.0 if group == 16 else 0.0
    lone[:, 5] = 40.0
    torch.testing.assert_close(_round_trip(fmt, lone, spec)[:, 5], lone[:, 5], rtol=0.02, atol=0)
    codes = torch.arange(128).remainder(1 << fmt.bits).repeat(3, 1) + fmt.low
    grid = (2 * codes + 1 if fmt.odd else codes) * 0.25
    torch.testing.assert_close(_round_trip(fmt, grid, spec), grid, rtol=0.01, atol=1e-6)


@each
@grouped
def test_zeros_stay_zero(name: str, group: int | None) -> None:
    fmt, spec, weight = _format(name), FormatSpec(name, group), _weight(4, 128)
    weight[1] = 0
    weight[2, :64] = 0
    decoded = _round_trip(fmt, weight, spec)
    assert torch.isfinite(decoded).all()
    assert not decoded[1].any()
    if group in (16, 32, 64):
        assert not decoded[2, :64].any()


@each
@pytest.mark.parametrize("activation", ["-a8tok", ""])
@pytest.mark.parametrize("group", ["", "g64"])
def test_the_product_is_that_of_the_decoded_weight(
    name: str, activation: str, group: str, sqnr: Callable[[Tensor, Tensor], float]
) -> None:
    fmt = _format(name)
    spec = LayerSpec.parse(f"w{fmt.tag}{group}{activation}")
    assert fmt.ops(spec)[-1] == ("int4_" if name == "int4" else "int8_") + ("linear" if activation else "weight_linear")
    x, bias = _weight(17, 192, 1), _weight(1, 40, 2)[0]
    tensors = fmt.encode(_weight(40, 192), spec.weight)
    dense = quantize_activation(x, spec.activation).double() @ fmt.decode(tensors, 192, spec.weight).double().T
    for dtype, least in ((torch.float32, 110), (torch.bfloat16, 45)):
        if dtype == torch.bfloat16 and activation:
            continue  # the codes of a rounded x differ
        y = fmt.linear(x.to(dtype), tensors, spec, bias)
        assert y.dtype == dtype
        assert sqnr(y.double(), dense + bias.double()) > least
    assert torch.equal(run_layer(x, tensors, spec, bias), fmt.linear(x, tensors, spec, bias))


@each
@pytest.mark.parametrize("group", [None, 64])
def test_gptq_beats_rounding_to_nearest(name: str, group: int | None) -> None:
    fmt, spec, weight = _format(name), FormatSpec(name, group), _weight(48, 128)
    x = _weight(512, 128, 1) @ (torch.eye(128) + 0.2 * _weight(128, 128, 2))
    gram = x.T @ x / len(x)
    scales = fmt.fit(weight, spec)

    def loss(codes: Tensor) -> float:
        error = fmt.dequantize(codes, scales, spec) - weight
        return float(((error @ gram) * error).sum())

    codes = gptq(weight, gram, scales, spec)
    assert codes.dtype == torch.int8
    assert torch.equal(fmt.unpack(fmt.pack(codes), 128), codes)
    assert loss(codes) < 0.8 * loss(fmt.quantize(weight, scales, spec))
