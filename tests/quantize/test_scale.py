"""The clipping search never makes its own error worse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_quant.quantize import formats, registry
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.format import ScalarFormat
from vdit_quant.quantize.scale import search_clip
from vdit_quant.quantize.spec import FormatSpec

K = 64


def _scalar_specs() -> list[FormatSpec]:
    out = []
    for name in registry.names(formats):
        fmt = registry.find(formats, name, "FORMAT")
        for group in fmt.group_sizes if isinstance(fmt, ScalarFormat) else ():
            try:
                fmt.check(K, FormatSpec(name, group))
            except InputError:
                continue
            out.append(FormatSpec(name, group))
    return out


@pytest.mark.parametrize("fmt_spec", _scalar_specs(), ids=lambda spec: f"{spec.format}-g{spec.group_size}")
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 2), weighted=st.booleans())
def test_the_weighted_error_never_grows(fmt_spec: FormatSpec, seed: int, spread: float, weighted: bool) -> None:
    fmt = fmt_spec.resolve()
    assert isinstance(fmt, ScalarFormat)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, K, generator=generator) * torch.exp(torch.randn(5, K, generator=generator) * spread)
    importance = torch.rand(K, generator=generator) if weighted else None
    cost = torch.ones(K) if importance is None else importance

    def loss(scales: dict[str, torch.Tensor]) -> torch.Tensor:
        error = fmt.dequantize(fmt.quantize(weight, scales, fmt_spec), scales, fmt_spec) - weight
        return (error.square() * cost).sum(1)

    scales, ratios = search_clip(weight, fmt, fmt_spec, importance)
    assert (loss(scales) <= loss(fmt.fit(weight, fmt_spec)) * 1.0001 + 1e-12).all()
    assert (ratios <= torch.as_tensor(fmt.own_clip(weight, fmt_spec)).clamp(min=1)).all()
    assert (ratios > 0).all()
