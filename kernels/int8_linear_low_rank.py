"""W8A8 linear layer with the up-projection of a low-rank branch in its epilogue (SVDQuant, Li et al. 2024)."""

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .int8_linear import check_codes, check_int8_weight, check_vectors, expect, int_matmul
from .op import define_op
from .quant_token import FLOATS

OP = "int8_linear_low_rank"


def _check(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    out_dtype: torch.dtype,
) -> None:
    check_codes(OP, codes, scale, out_dtype)
    m, n = codes.shape[0], weight.shape[0]
    check_int8_weight(OP, codes.shape[1], weight)
    check_vectors(OP, n, weight_scale, bias)
    ok = low.dim() == 2 and low.shape[0] == m and low.shape[1] > 0 and low.dtype in FLOATS
    expect(ok, OP, f"a float low [{m}, R]", low)
    ok = up.shape == (n, low.shape[1]) and up.dtype == low.dtype
    expect(ok, OP, f"up {low.dtype} of shape ({n}, {low.shape[1]})", up)


def _reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias, low, up, out_dtype)
    y = int_matmul(codes, weight).float().mul_(scale.unsqueeze(1)).mul_(weight_scale)
    y.addmm_(low.float(), up.float().t())
    if bias is not None:
        y.add_(bias.float())
    return y.to(out_dtype)


@define_op("int8_linear_low_rank")
def int8_linear_low_rank(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """y[m, n] = int8_linear(...)[m, n] + sum_r low[m, r] * up[n, r], in fp32 and rounded once.

    codes: int8 [M, K]; scale: fp32 [M], both from `quant_token`
    weight: int8 [N, K], K contiguous; weight_scale: fp32 [N]
    bias: float [N] or None
    low: float [M, R], the input through the branch's down-projection; up: low.dtype [N, R]
    returns: out_dtype [M, N]
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(codes, scale, weight, weight_scale, bias, low, up, out_dtype)


@int8_linear_low_rank.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias, low, up, out_dtype)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=out_dtype)


@int8_linear_low_rank.register_cuda
def _(*args: Any) -> Tensor:
    _check(*args)
    found: Tensor = dispatch.run(OP, _reference, *args)
    return found
