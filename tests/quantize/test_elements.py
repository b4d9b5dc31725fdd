"""The element of every row of an `fp4` weight: E2M1, E1M2 or E3M0, and the range it covers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdit_quant.quantize.compose import Choices, fit_scales
from vdit_quant.quantize.format import Tensors
from vdit_quant.quantize.minifloat import ELEMENTS, Minifloat, element_rule
from vdit_quant.quantize.scale import search_clip
from vdit_quant.quantize.spec import FormatSpec, LayerSpec

K = 96
GROUPS = (None, 16, 32)
CLIPS = ("none", "weight", "output")
RULE = [  # largest magnitude over the lower quartile, and the element whose range is nearest to it
    (3.0, "e1m2"), (7.0, "e1m2"), (9.0, "e1m2"), (9.3, "e2m1"), (12.0, "e2m1"), (27.0, "e2m1"), (28.5, "e3m0"),
    (64.0, "e3m0"), (1e9, "e3m0"),
]  # fmt: skip


def _outliers(n: int, seed: int, rate: float, size: float) -> Tensor:
    """float32 [n, K]: normal numbers, some of them `size` times as large, in rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, K, generator=generator) * torch.exp(torch.randn(n, 1, generator=generator))
    return weight * torch.where(torch.rand(n, K, generator=generator) < rate, size, 1.0)


def _gram(seed: int) -> Tensor:
    """float32 [K, K]: that of inputs whose channels differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(4 * K, K, generator=generator) * torch.exp(1.5 * torch.randn(K, generator=generator))
    return x.T @ x / len(x)


def _errors(weight: Tensor, scales: Tensors, spec: LayerSpec, cost: Tensor) -> Tensor:
    """float64 [N]."""
    fmt = spec.weight.resolve()
    assert isinstance(fmt, Minifloat)
    rounded = fmt.dequantize(fmt.quantize(weight, scales, spec.weight), scales, spec.weight)
    return ((rounded - weight).double().square() * cost).sum(1)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("clip", CLIPS)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31), rate=st.floats(0, 0.2), size=st.floats(1, 40))
def test_no_row_errs_more_than_on_any_one_element(
    group: int | None, clip: str, seed: int, rate: float, size: float
) -> None:
    spec, weight, gram = LayerSpec(FormatSpec("fp4", group)), _outliers(7, seed, rate, size), _gram(seed)
    cost = gram.diagonal() if clip == "output" else torch.ones(K)
    searched = _errors(weight, fit_scales(weight, gram, spec, Choices(clip=clip)), spec, cost)
    for name in ELEMENTS:
        scales = fit_scales(weight, gram, spec, Choices(clip=clip, element=name))
        assert (scales["weight_element"] == ELEMENTS.index(name)).all()
        assert (searched <= _errors(weight, scales, spec, cost) * (1 + 1e-9)).all()


@pytest.mark.parametrize("group", GROUPS)
def test_the_ratios_returned_are_those_of_the_scales(group: int | None) -> None:
    spec = FormatSpec("fp4", group)
    fmt, weight = spec.resolve(), _outliers(40, 0, 0.02, 10.0)
    assert isinstance(fmt, Minifloat)
    scales, ratios = search_clip(weight, fmt, spec, _gram(0).diagonal())
    assert set(scales["weight_element"].tolist()) == {0, 1, 2}
    given = fmt.with_elements(scales["weight_element"].long()).fit(weight, spec, ratios)
    assert all(torch.equal(t, given[name]) for name, t in scales.items())


@pytest.mark.parametrize("size", [1e-25, 1e15])
def test_the_search_finds_the_same_elements_whatever_the_size_of_the_matrix(size: float) -> None:
    spec = FormatSpec("fp4")
    fmt, weight = spec.resolve(), _outliers(40, 0, 0.02, 10.0)
    assert isinstance(fmt, Minifloat)
    plain, scaled = (search_clip(w, fmt, spec)[0]["weight_element"] for w in (weight, weight * size))
    assert (plain == scaled).float().mean() > 0.95


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("clip", CLIPS)
def test_the_papers_rule_takes_the_element_whose_range_is_nearest_to_a_rows_spread(
    group: int | None, clip: str
) -> None:
    """It looks at neither the inputs, nor the error, nor the range that is covered."""
    weight = torch.ones(len(RULE), K)
    weight[:, 0] = -torch.tensor([spread for spread, _ in RULE])
    want = [ELEMENTS.index(name) for _, name in RULE]
    assert element_rule(weight).tolist() == want
    spec = LayerSpec(FormatSpec("fp4", group))
    scales = fit_scales(weight, _gram(0), spec, Choices(clip=clip, element="rule"))
    assert scales["weight_element"].tolist() == want
