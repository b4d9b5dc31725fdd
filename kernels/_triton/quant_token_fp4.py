"""Triton twin of `quant_token_fp4`: one program per token, the row stays in registers between maxima and rounding."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from ..int4_linear import GROUPS
from ..quant_token import TINY
from ..quant_token_fp4 import BLOCK_LARGEST, LARGEST, ROW_LARGEST
from .quant_token import limits, quantize_by_token, supports
from .tiles import await_inputs, round_to_e2m1

__all__ = ["limits", "run", "supports"]


@triton.jit
def quant_token_fp4_kernel(
    x_ptr, codes_ptr, scale_ptr, K, TINY: tl.constexpr, LARGEST: tl.constexpr, BLOCK_LARGEST: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token per program; BLOCK >= K; GROUP is 0 for one scale per token. LARGEST: its maximum's level."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    # tl.max drops nan: as inf it makes the scale, and so every output of this token, not finite.
    amax = tl.maximum(tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=0), TINY)
    t = x * tl.div_rn(LARGEST, amax)
    if GROUP > 0:
        blocks = tl.reshape(t, (BLOCK // GROUP, GROUP))
        largest = tl.max(tl.where(blocks == blocks, tl.abs(blocks), float("inf")), axis=1)
        block = tl.minimum(tl.maximum(tl.ceil(largest * (16.0 / 12.0)), 1.0), BLOCK_LARGEST)
        code = round_to_e2m1(blocks * tl.div_rn(16.0, block)[:, None]).to(tl.int32)
        level = (code * block.to(tl.int32)[:, None] + 8) >> 4
        codes = tl.reshape(level, (BLOCK,))
    else:
        codes = round_to_e2m1(t)
    tl.store(codes_ptr + row * K + k, codes.to(tl.int8), mask=k < K)
    along = tl.sum(t * codes.to(tl.float32), axis=0)
    gain = tl.where(along > 0, tl.sum(t * t, axis=0) / along, 1.0)
    tl.store(scale_ptr + row, tl.div_rn(amax, LARGEST) * gain)


def run(op: str, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`quant_token_fp4` by Triton."""
    return quantize_by_token(
        quant_token_fp4_kernel, x, least=max(GROUPS), TINY=TINY, LARGEST=ROW_LARGEST if group else LARGEST,
        BLOCK_LARGEST=float(BLOCK_LARGEST), GROUP=group,
    )  # fmt: skip
