"""Triton twin of `quant_token_int4`: one program per token, the row stays in registers from its ends to rounding."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from ..int4_linear import GROUPS
from ..quant_token_int4 import TINY
from .quant_token import limits, quantize_by_token, supports
from .tiles import await_inputs

__all__ = ["limits", "run", "supports"]


@triton.jit
def round_half_even(t):
    """fp32 for |t| < 2**22: added to t, 1.5 * 2**23 leaves no room for a fraction."""
    return (t + 12582912.0) - 12582912.0


@triton.jit
def covering_step(x, axis: tl.constexpr, TINY: tl.constexpr):
    """The smallest step whose codes -8 to 7 reach both ends of x along an axis."""
    # tl.max drops nan: as inf it makes the scale, and so every output of this token, not finite.
    seen = tl.where(x == x, x, float("inf"))
    ends = tl.maximum(tl.div_rn(tl.max(seen, axis=axis), 7.0), tl.max(-seen, axis=axis) * 0.125)
    return tl.maximum(ends, TINY)


@triton.jit
def level_of(code, scale):
    """(code * r + 8) >> 4 in fp32, where it is exact; scale: r / 16."""
    return tl.floor(code * scale + 0.5)


@triton.jit
def nearer(best, level, t):
    """`level` where it is nearer to t than `best`."""
    return tl.where(tl.abs(level - t) < tl.abs(best - t), level, best)


@triton.jit
def quant_token_int4_kernel(
    x_ptr, codes_ptr, scale_ptr, K, TINY: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One token per program; BLOCK >= K; GROUP is 0 for one scale per token."""
    await_inputs()
    at = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    # The zeros behind the end are an end of the row only where all of it has one sign: then the other end is further.
    x = tl.load(x_ptr + at * K + k, mask=k < K, other=0.0).to(tl.float32)
    if GROUP > 0:
        x = tl.reshape(x, (BLOCK // GROUP, GROUP))
        step = covering_step(x, 1, TINY)
        row = tl.maximum(tl.div_rn(tl.max(step, axis=0), 255.0 / 16.0), TINY)
        r = tl.minimum(tl.maximum(round_half_even(tl.div_rn(step, row) * 16.0), 1.0), 255.0)[:, None]
        t = tl.div_rn(x, row)
        code = round_half_even(tl.minimum(tl.maximum(tl.div_rn(t * 16.0, r), -8.0), 7.0))
        scale = r * 0.0625
        # Levels are rounded to integers, so a neighbour's may be nearer than the rounded code's.
        level = level_of(code, scale)
        level = nearer(level, level_of(tl.maximum(code - 1.0, -8.0), scale), t)
        level = nearer(level, level_of(tl.minimum(code + 1.0, 7.0), scale), t)
        t = tl.reshape(t, (BLOCK,))
        level = tl.reshape(level, (BLOCK,))
    else:
        row = covering_step(x, 0, TINY)
        t = tl.div_rn(x, row)
        level = round_half_even(tl.minimum(tl.maximum(t, -8.0), 7.0))
    tl.store(codes_ptr + at * K + k, level.to(tl.int8), mask=k < K)
    along = tl.sum(t * level, axis=0)
    gain = tl.where(along > 0, tl.sum(t * t, axis=0) / along, 1.0)
    tl.store(scale_ptr + at, row * gain)


def run(op: str, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`quant_token_int4` by Triton."""
    return quantize_by_token(quant_token_int4_kernel, x, least=max(GROUPS), TINY=TINY, GROUP=group)
