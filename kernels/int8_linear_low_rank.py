"""W8A8 linear layer with the up-projection of a low-rank branch in its epilogue (SVDQuant, Li et al. 2024)."""

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .int8_linear import check_codes, check_int8_weight, check_vectors, int_matmul, unfit
from .norm_quant import check_rows, spread
from .op import define_op
from .quant_token import FLOATS

OP = "int8_linear_low_rank"


def _check(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    branch: list[Tensor],
    stream: list[Tensor],
    out_dtype: torch.dtype,
) -> None:
    check_codes(OP, codes, scale, out_dtype)
    m, n = codes.shape[0], weight.shape[0]
    check_int8_weight(OP, codes.shape[1], weight)
    check_vectors(OP, n, weight_scale, bias)
    if len(branch) not in (2, 3):
        raise unfit(OP, "branch to be [low, up] or [low, up, owner]", f"{len(branch)} tensors")
    low, up, *owner = branch
    ok = up.dim() == 2 and up.shape[0] == n and up.shape[1] > 0 and up.dtype in FLOATS
    if not ok:
        raise unfit(OP, f"a float up [{n}, R]", up)
    r = up.shape[1]
    ok = low.dim() == 2 and low.shape[0] == m and low.shape[1] > 0 and low.dtype in FLOATS
    if not ok:
        raise unfit(OP, f"a float low [{m}, R]", low)
    ok = low.shape[1] % r == 0 if owner else low.shape[1] == r
    if not ok:
        raise unfit(OP, f"a low of {r} columns{' a layer' * bool(owner)}", low)
    if owner:
        ok = owner[0].dtype == torch.uint8 and owner[0].dim() == 1 and len(owner[0]) > 0 and n % len(owner[0]) == 0
        if not ok:
            raise unfit(OP, f"an owner torch.uint8 of a length that divides {n}", owner[0])
    if len(stream) >= 3:
        raise unfit(OP, "stream to be [], [residual] or [residual, gate]", f"{len(stream)} tensors")
    if stream:
        ok = stream[0].shape == (m, n) and stream[0].dtype == out_dtype
        if not ok:
            raise unfit(OP, f"a residual {out_dtype} of shape ({m}, {n})", stream[0])
    for gate in stream[1:]:
        check_rows(OP, "gate", gate, m, n)


def _reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    branch: list[Tensor],
    stream: list[Tensor],
    out_dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias, branch, stream, out_dtype)
    y = int_matmul(codes, weight).float().mul_(scale.unsqueeze(1)).mul_(weight_scale)
    low, up, *owner = branch
    y.addmm_(low.float(), _wide_up(low, up, owner).t())
    if bias is not None:
        y.add_(bias.float())
    if not stream:
        return y.to(out_dtype)
    residual, *gate = stream
    if gate:
        y.mul_(spread(gate[0], len(y)))
    return y.add_(residual.float()).to(out_dtype)


def _wide_up(low: Tensor, up: Tensor, owner: list[Tensor]) -> Tensor:
    """fp32 [N, L * R]: what every column of low counts for; 0 for those of another layer than a row's own."""
    up = up.to(low.dtype).float()
    if not owner:
        return up
    n, r = up.shape
    wide = up.new_zeros(n, low.shape[1] // r, r)
    wide[torch.arange(n, device=up.device), owner[0].long().repeat_interleave(n // len(owner[0]))] = up
    return wide.view(n, -1)


@define_op("int8_linear_low_rank")
def int8_linear_low_rank(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    branch: list[Tensor],
    stream: list[Tensor],
    out_dtype: torch.dtype,
) -> Tensor:
    """y[m, n] = int8_linear(...)[m, n] + sum_r low[m, owner[n // U] * R + r] * up[n, r], in fp32 and rounded once; with
    a stream, residual[m, n] + gate[m // (M / B), n] times that.

    codes: int8 [M, K]; scale: fp32 [M], both from `quant_token`
    weight: int8 [N, K], K contiguous; weight_scale: fp32 [N]
    bias: float [N] or None
    branch: [low, up] or [low, up, owner]; low: float [M, L * R], any row stride, the input through the
        down-projections of L layers (`norm_down`, `act_down`); up: float [N, R], read as low's dtype; owner: uint8
        [N / U], the layer, never less than the one before, of every U rows of the weight; without it there is one
    stream: [], [residual] or [residual, gate]; residual: out_dtype [M, N]; gate: float [B, N], one row a sample of
        M / B tokens
    returns: out_dtype [M, N]; on GPUs a row does not depend on the other rows of its batch
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(codes, scale, weight, weight_scale, bias, branch, stream, out_dtype)


@int8_linear_low_rank.register_fake
def _(codes: Tensor, scale: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    _check(codes, scale, weight, *rest)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=rest[-1])


@int8_linear_low_rank.register_cuda
def _(*args: Any) -> Tensor:
    _check(*args)
    found: Tensor = dispatch.run(OP, _reference, *args)
    return found
