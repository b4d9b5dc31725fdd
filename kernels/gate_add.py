"""A branch gated and added to the residual stream: where its product cannot do it and no norm reads the sum next."""

from torch import Tensor

from . import dispatch
from .norm_quant import check_stream, gated_residual
from .op import define_op

OP = "gate_add"


def _reference(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return gated_residual([residual, branch] if gate is None else [residual, branch, gate])


def _check(residual: Tensor, branch: Tensor, gate: Tensor | None) -> None:
    check_stream(OP, [residual, branch] if gate is None else [residual, branch, gate])


@define_op("gate_add")
def gate_add(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """h[m, n] = residual[m, n] + gate[m // (M / B), n] * branch[m, n], in fp32 and rounded once.

    residual, branch: fp32 | bf16 | fp16 [M, N], any row stride
    gate: float [B, N], one row a sample of M / B tokens (rows may be a chunk of a wider matrix); or None for ones
    returns: residual.dtype [M, N]; a row does not depend on the other rows of its batch
    Raises ValueError when a shape or dtype does not fit.
    """
    _check(residual, branch, gate)
    return _reference(residual, branch, gate)


@gate_add.register_fake
def _(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    _check(residual, branch, gate)
    return residual.new_empty(residual.shape)


@gate_add.register_cuda
def _(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    _check(residual, branch, gate)
    found: Tensor = dispatch.run(OP, _reference, residual, branch, gate)
    return found
