"""W8A8 linear layer whose output is gated and added to the residual stream, as at the end of every DiT branch."""

from typing import Any

from torch import Tensor

from . import dispatch
from .int8_linear import check_codes, check_int8_weight, check_vectors, int_matmul, unfit
from .op import define_op
from .quant_token import FLOATS

OP = "int8_linear_add"


def _check(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> None:
    if residual.dtype not in FLOATS:
        raise unfit(OP, "a float residual [M, N]", residual)
    check_codes(OP, codes, scale, residual.dtype)
    m, n = codes.shape[0], weight.shape[0]
    check_int8_weight(OP, codes.shape[1], weight)
    check_vectors(OP, n, weight_scale, bias)
    if residual.shape != (m, n):
        raise unfit(OP, f"a float residual of shape ({m}, {n})", residual)
    if gate is not None:
        ok = gate.dim() == 2 and gate.shape[1] == n and gate.dtype in FLOATS
        if not ok:
            raise unfit(OP, f"a float gate [B, {n}]", gate)
        rows = gate.shape[0]
        if rows <= 0 or m % rows != 0:
            raise unfit(OP, f"a gate whose rows cut {m} tokens into equal samples", f"{rows} rows")


def _reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias, residual, gate)
    y = int_matmul(codes, weight).float().mul_(scale.unsqueeze(1)).mul_(weight_scale)
    if bias is not None:
        y.add_(bias.float())
    if gate is not None:
        samples = y.view(gate.shape[0], y.shape[0] // gate.shape[0], y.shape[1])
        y = samples.mul_(gate.float().unsqueeze(1)).view_as(y)
    return y.add_(residual.float()).to(residual.dtype)


@define_op("int8_linear_add")
def int8_linear_add(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """y[m, n] = residual[m, n] + gate[m // (M / B), n] * int8_linear(...)[m, n], in fp32 and rounded once.

    codes: int8 [M, K]; scale: fp32 [M], both from `quant_token`
    weight: int8 [N, K], K contiguous; weight_scale: fp32 [N]
    bias: float [N] or None
    residual: float [M, N]
    gate: float [B, N], one row a sample of M / B tokens (rows may be a chunk of a wider matrix); or None for ones
    returns: residual.dtype [M, N]; a row does not depend on the other rows of its batch
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(codes, scale, weight, weight_scale, bias, residual, gate)


@int8_linear_add.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias, residual, gate)
    return residual.new_empty(residual.shape)


@int8_linear_add.register_cuda
def _(*args: Any) -> Tensor:
    _check(*args)
    found: Tensor = dispatch.run(OP, _reference, *args)
    return found
