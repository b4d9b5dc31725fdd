"""What every number format does to matrices of odd sizes, found by file name as in `test_formats.py`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdit_quant.quantize import formats, registry
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.format import Format, ScalarFormat, Tensors
from vdit_quant.quantize.spec import FormatSpec
from vdit_quant.quantize.vector import VectorFormat

WIDEST = 384
ODD = st.integers(0, WIDEST // 2).map(lambda i: 2 * i + 1)
SPECS = [
    FormatSpec(name, group)
    for name in registry.names(formats)
    for group in registry.find(formats, name, "FORMAT").group_sizes
]


def _fits(k: int, spec: FormatSpec) -> bool:
    try:
        spec.resolve().check(k, spec)
    except InputError:
        return False
    return True


def _width(odd: int, spec: FormatSpec) -> int:
    """An odd multiple of the least number that the format's rows must be a multiple of: 1 where any length will do."""
    unit = next(2**i for i in range(10) if _fits(2**i, spec))
    return unit * min(odd, WIDEST // unit // 2 * 2 - 1)


def _least_sqnr(spec: FormatSpec) -> float:
    """dB that a matrix of normal numbers keeps at least, as in `test_formats.py`, by the bits of a code alone."""
    held = spec.resolve().layout(1, WIDEST, spec)["weight"]
    if held.dtype.is_floating_point:
        return -20 * math.log10(torch.finfo(held.dtype).eps / 2)
    return 5.2 * min(8 * held.nbytes / WIDEST, 8) - 8


def _check_codes(fmt: Format, spec: FormatSpec, tensors: Tensors, k: int, seed: int) -> None:
    """Any codes at all, not only those that rounding gives, are packed and unpacked exactly."""
    generator = torch.Generator().manual_seed(seed)
    n = len(tensors["weight"])
    if isinstance(fmt, VectorFormat):
        codes = torch.randint(fmt.entries, (n, k // fmt.length), generator=generator)
        stored = fmt.store(codes, torch.randn(fmt.entries, fmt.length, generator=generator), torch.ones(n))
        assert torch.equal(fmt.codes(stored, k), codes)
    elif isinstance(fmt, ScalarFormat):
        scales = {name: t for name, t in tensors.items() if name != "weight"}
        levels = fmt.levels(scales, spec)  # [N, groups, L]
        index = torch.randint(levels.shape[-1], (n, k), generator=generator)
        codes = fmt.codes_of(index)
        stored = fmt.store(codes, scales)
        assert torch.equal(fmt.index_of(codes), index)
        assert torch.equal(fmt.unpack(stored["weight"], k), codes)
        value = levels.gather(2, index.view(n, levels.shape[1], -1)).view(n, k)
        torch.testing.assert_close(fmt.decode(stored, k, spec), value, rtol=1e-6, atol=0)
    else:
        return
    assert stored["weight"].shape == tensors["weight"].shape
    assert stored["weight"].dtype == tensors["weight"].dtype
    _check_int8_form(fmt, spec, stored, k)


def _check_int8_form(fmt: Format, spec: FormatSpec, tensors: Tensors, k: int) -> None:
    form = fmt.to_int8(tensors, k, spec)
    if form is None:
        return
    codes, scale = form
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert torch.equal(codes.float() * scale[:, None], fmt.decode(tensors, k, spec))


def _check_nearest(fmt: ScalarFormat, spec: FormatSpec, tensors: Tensors, weight: Tensor) -> None:
    levels = fmt.levels({name: t for name, t in tensors.items() if name != "weight"}, spec)
    n, k = weight.shape
    grouped = weight.view(n, levels.shape[1], -1, 1)
    nearest = (levels[:, :, None] - grouped).abs().amin(-1).view(n, k)
    error = (fmt.decode(tensors, k, spec) - weight).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fmt_spec", SPECS, ids=lambda spec: f"{spec.format}-g{spec.group_size}")
@settings(deadline=None, max_examples=8)
@given(n=st.integers(0, 4).map(lambda i: 2 * i + 1), odd=ODD, seed=st.integers(0, 2**31))
def test_odd_sizes_are_held_as_every_other(fmt_spec: FormatSpec, n: int, odd: int, seed: int) -> None:
    fmt, k = fmt_spec.resolve(), _width(odd, fmt_spec)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    tensors, layout = fmt.encode(weight, fmt_spec), fmt.layout(n, k, fmt_spec)
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert found == {name: (held.shape, held.dtype) for name, held in layout.items()}
    decoded = fmt.decode(tensors, k, fmt_spec)
    assert decoded.shape == weight.shape
    assert float((decoded - weight).norm()) <= 10 ** (-_least_sqnr(fmt_spec) / 20) * float(weight.norm())
    if isinstance(fmt, ScalarFormat):
        _check_nearest(fmt, fmt_spec, tensors, weight)
    _check_int8_form(fmt, fmt_spec, tensors, k)
    _check_codes(fmt, fmt_spec, tensors, k, seed)
