"""Normalisation, modulation and the quantisation of what a layer reads, in one op; also behind a gated residual."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .int8_linear import check_float, describe, unfit
from .op import define_op
from .quant_token import FLOATS
from .transform import FORMS, Transform, parse_transform

KINDS = ("layer", "rms")
Quantized = tuple[Tensor, Tensor]
Gated = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Norm:
    """y = xhat * weight + bias, then y * (1 + scale[b]) + shift[b]; xhat has mean 0 (layer only) and power 1 over K."""

    mod: list[Tensor]
    affine: list[Tensor]
    kind: str
    eps: float

    def check(self, op: str, m: int, k: int) -> None:
        """Raise ValueError unless this fits `m` rows of `k` elements."""
        if self.kind not in KINDS:
            raise unfit(op, f"kind to be one of {', '.join(KINDS)}", repr(self.kind))
        if len(self.mod) not in (0, 2):
            raise unfit(op, "mod to be [] or [shift, scale]", f"{len(self.mod)} tensors")
        if len(self.affine) >= 3:
            raise unfit(op, "affine to be [], [weight] or [weight, bias]", f"{len(self.affine)} tensors")
        for vector in self.affine:
            ok = vector.shape == (k,) and vector.dtype in FLOATS
            if not ok:
                raise unfit(op, f"a float affine of shape ({k},)", vector)
        for rows in self.mod:
            check_rows(op, "mod", rows, m, k)
        if self.mod:
            shift, scale = self.mod
            if shift.shape != scale.shape:
                raise unfit(op, f"scale like shift, {describe(shift)}", scale)

    def apply(self, x: Tensor) -> Tensor:
        """Float rows [M, K] -> fp32 [M, K]: the torch reference."""
        wide, k = x.float(), x.shape[1]
        weight, bias = [*(t.float() for t in self.affine), None, None][:2]
        if self.kind == "layer":
            y = F.layer_norm(wide, (k,), weight, bias, self.eps)
        else:
            y = F.rms_norm(wide, (k,), weight, self.eps)
            y = y if bias is None else y + bias
        if self.mod:
            shift, scale = (spread(t, x.shape[0]) for t in self.mod)
            y = y * (1 + scale) + shift
        return y


def check_rows(op: str, name: str, rows: Tensor, m: int, k: int) -> None:
    """Check a [B, K] tensor that every run of M / B rows shares."""
    ok = rows.dim() == 2 and rows.dtype in FLOATS and rows.shape[1] == k
    if not ok:
        raise unfit(op, f"float {name} of shape (B, {k})", rows)
    ok = rows.shape[0] > 0 and m % rows.shape[0] == 0
    if not ok:
        raise unfit(op, f"{name} with a number of rows that divides M={m}", rows)


def spread(rows: Tensor, m: int) -> Tensor:
    """[B, K] -> fp32 [M, K]: row b for the rows b * M / B to (b + 1) * M / B."""
    return rows.float().repeat_interleave(m // rows.shape[0], dim=0)


def gated_residual(stream: list[Tensor]) -> Tensor:
    """residual + gate[b] * branch in fp32, rounded once to the residual's dtype."""
    residual, branch, *gate = stream
    wide = branch.float()
    if gate:
        wide = spread(gate[0], len(branch)) * wide
    return (residual.float() + wide).to(residual.dtype)


def _reference(x: Tensor, norm: Norm, transform: Transform) -> Quantized:
    return transform.quantize(norm.apply(x))


def _gate_reference(residual: Tensor, rest: list[Tensor], norm: Norm, transform: Transform) -> Gated:
    h = gated_residual([residual, *rest])
    return h, *_reference(h, norm, transform)


def check_stream(op: str, stream: list[Tensor]) -> None:
    """Raise ValueError unless this is [residual, branch] or [residual, branch, gate] of one shape."""
    if len(stream) not in (2, 3):
        raise unfit(op, "stream to be [residual, branch] or [residual, branch, gate]", len(stream))
    residual, branch, *gate = stream
    check_float(op, residual)
    ok = branch.shape == residual.shape and branch.dtype in FLOATS
    if not ok:
        raise unfit(op, f"a float branch of shape {tuple(residual.shape)}", branch)
    for rows in gate:
        check_rows(op, "gate", rows, *residual.shape)


def _parse(op: str, form: str, x: Tensor, *args: Any) -> tuple[Norm, Transform]:
    """The arguments of an op after its first, checked against the rows of `x`."""
    mod, affine, transform, kind, eps, block_size, hadamard_kind = args
    check_float(op, x)
    norm = Norm(mod, affine, kind, eps)
    norm.check(op, *x.shape)
    parsed = parse_transform(op, transform, block_size, hadamard_kind, form)
    parsed.check(op, x.shape[1])
    return norm, parsed


def _define_norm_quant(name: str, form: str) -> Any:
    @define_op(name)
    def op(
        x: Tensor,
        mod: list[Tensor],
        affine: list[Tensor],
        transform: list[Tensor],
        kind: str,
        eps: float,
        block_size: int,
        hadamard_kind: str,
    ) -> tuple[Tensor, Tensor]:
        args = (mod, affine, transform, kind, eps, block_size, hadamard_kind)
        return _reference(x, *_parse(name, form, x, *args))

    @op.register_fake
    def _(x: Tensor, *args: Any) -> Quantized:
        _, transform = _parse(name, form, x, *args)
        return transform.empty(x, x.shape[1])

    @op.register_cuda
    def _(x: Tensor, *args: Any) -> Quantized:
        found: Quantized = dispatch.run(name, _reference, x, *_parse(name, form, x, *args))
        return found

    return op


def _define_gate_norm_quant(name: str, form: str) -> Any:
    @define_op(name)
    def op(
        stream: list[Tensor],
        mod: list[Tensor],
        affine: list[Tensor],
        transform: list[Tensor],
        kind: str,
        eps: float,
        block_size: int,
        hadamard_kind: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_stream(name, stream)
        args = (mod, affine, transform, kind, eps, block_size, hadamard_kind)
        return _gate_reference(stream[0], stream[1:], *_parse(name, form, stream[0], *args))

    @op.register_fake
    def _(stream: list[Tensor], *args: Any) -> Gated:
        check_stream(name, stream)
        _, transform = _parse(name, form, stream[0], *args)
        return stream[0].new_empty(stream[0].shape), *transform.empty(stream[0], stream[0].shape[1])

    @op.register_cuda
    def _(stream: list[Tensor], *args: Any) -> Gated:
        check_stream(name, stream)
        parsed = _parse(name, form, stream[0], *args)
        found: Gated = dispatch.run(name, _gate_reference, stream[0], stream[1:], *parsed)
        return found

    return op


norm_quant = _define_norm_quant("norm_quant", "int8")
"""norm_quant(x, mod, affine, transform, kind, eps, block_size, hadamard_kind) -> (codes, scale).

Codes and scales of T(norm(x)), as `quant_token` defines them:

xhat = (x - mean) / sqrt(var + eps) for kind "layer", x / sqrt(mean(x**2) + eps) for kind "rms"; moments over K
y = (xhat * weight + bias) * (1 + scale[b]) + shift[b], b = m // (M / B)
T(y) = (y * pre_scale * signs)[m, block] @ H / sqrt(block_size) for every block of channels, see `hadamard`

All of it is fp32: nothing is rounded to x's dtype between x and the codes, where an unfused chain rounds after the
norm, the modulation, the scale and the rotation. On GPUs, what goes into the product with H is rounded once more: an
input in bf16 to bf16, and anything to fp16, after a power of two per row that keeps it in range, by the portable twin,
which runs where Gluon does not (on AMD's GPUs, and for K that does not fit).

x: fp32 | bf16 | fp16 [M, K]; any row stride
mod: [] or [shift, scale], float [B, K] with any row strides (chunks of [B, 6K] are fine); B divides M
affine: [], [weight] or [weight, bias], float [K]
transform: [], [pre_scale], [signs] or [pre_scale, signs]; pre_scale fp32 [K], signs int8 [K] of +-1
block_size: 0 for no rotation; hadamard_kind: "sylvester" or "regular"
returns codes: int8 [M, K]; scale: fp32 [M]
Raises ValueError when a shape, dtype, size or kind does not fit.
"""

norm_quant_fp8 = _define_norm_quant("norm_quant_fp8", "fp8")
"""`norm_quant` with codes float8_e4m3fn [M, K] and scale[m] = amax[m] / 448."""

NORM_QUANT = {
    "int8": norm_quant,
    "fp8": norm_quant_fp8,
    **{form: _define_norm_quant(f"norm_quant_{form}", form) for form in FORMS if form.startswith("fp4")},
}
"""Form of `transform.FORMS` -> `norm_quant` to it: `norm_quant_fp4` and the others have the codes, int8, and scales of
`quant_token_fp4` with their group."""

gate_norm_quant = _define_gate_norm_quant("gate_norm_quant", "int8")
"""gate_norm_quant(stream, mod, affine, transform, kind, eps, block_size, hadamard_kind) -> (h, codes, scale).

h = residual + gate[b] * branch in fp32, rounded once to the residual's dtype; then `norm_quant` of h as rounded.

stream: [residual, branch] or [residual, branch, gate]; residual and branch fp32 | bf16 | fp16 [M, K] with any row
    strides, gate float [B, K] with any row stride; the rest as for `norm_quant`
returns h: residual's dtype [M, K]; codes: int8 [M, K]; scale: fp32 [M]
Raises ValueError when a shape, dtype, size or kind does not fit.
"""

gate_norm_quant_fp8 = _define_gate_norm_quant("gate_norm_quant_fp8", "fp8")
"""`gate_norm_quant` with codes float8_e4m3fn [M, K] and scale[m] = amax[m] / 448."""

GATE_NORM_QUANT = {"int8": gate_norm_quant, "fp8": gate_norm_quant_fp8}
"""Form of `transform.FORMS` -> `gate_norm_quant` to it; the other forms have none."""
