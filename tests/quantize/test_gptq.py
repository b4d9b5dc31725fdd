"""GPTQ against the algorithm written down column by column, on the grid of every kind of format."""

import pytest
import torch
from torch import Tensor

from vdit_quant.quantize.format import ScalarFormat, Tensors, group_of
from vdit_quant.quantize.gptq import BLOCK, gptq, inverse_factor, refine
from vdit_quant.quantize.spec import FormatSpec

N, K = 24, 320  # two and a half blocks


def _by_columns(weight: Tensor, gram: Tensor, scales: Tensors, spec: FormatSpec, act_order: bool) -> Tensor:
    """Codes int8 [N, K]: float64, each error into every later column at once."""
    fmt = spec.resolve()
    assert isinstance(fmt, ScalarFormat)
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(K)
    factor = inverse_factor(gram[order][:, order], 0.01).double()
    levels, group = fmt.levels(scales, spec).double(), group_of(K, spec, weight.device)
    work, index = weight.double(), torch.empty(N, K, dtype=torch.int64)
    for j, column in enumerate(order.tolist()):
        own = levels[:, group[column]]
        index[:, column] = (own - work[:, column, None]).abs().argmin(1)
        rounded = own.gather(1, index[:, column, None])[:, 0]
        error = (work[:, column] - rounded) / factor[j, j]
        work[:, order[j + 1 :]] -= torch.outer(error, factor[j, j + 1 :])
    return fmt.codes_of(index)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("ternary", None), ("int4", None), ("int4", 64), ("int6", 16), ("fp4", 32), ("nvfp4", 16), ("mxfp4", 32),
        ("nf4", 64), ("int8", None), ("fp8", None),
    ],
)  # fmt: skip
def test_gptq_is_the_algorithm_column_by_column(name: str, group: int | None, act_order: bool) -> None:
    generator = torch.Generator().manual_seed(K)
    weight = torch.randn(N, K, generator=generator)
    x = torch.randn(2 * K, K, generator=generator) @ (torch.eye(K) + 0.1 * torch.randn(K, K, generator=generator))
    gram, spec = x.T @ x, FormatSpec(name, group)
    fmt = spec.resolve()
    assert isinstance(fmt, ScalarFormat)
    scales = fmt.fit(weight, spec)
    found = gptq(weight, gram, scales, spec, act_order=act_order)
    want = _by_columns(weight, gram, scales, spec, act_order)
    assert K % BLOCK
    # A weight that lies on a middle to float32's precision may go either way, and then so may those after it.
    same = fmt.index_of(found) == fmt.index_of(want)
    assert same.float().mean() > 0.98
    assert same.all(1).float().mean() > 0.75


@pytest.mark.parametrize("name", ["int4", "fp4", "ternary"])
def test_inputs_that_were_all_zero_leave_the_weight_rounded_to_nearest(name: str) -> None:
    weight, spec = torch.randn(N, K, generator=torch.Generator().manual_seed(1)), FormatSpec(name, None)
    fmt, gram = spec.resolve(), torch.zeros(K, K)
    assert isinstance(fmt, ScalarFormat)
    scales = fmt.fit(weight, spec)
    nearest = fmt.quantize(weight, scales, spec)
    assert torch.equal(gptq(weight, gram, scales, spec), nearest)
    assert torch.equal(refine(nearest, weight, gram, scales, spec), nearest)
