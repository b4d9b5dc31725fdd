"""Triton twin of `quant_token_fp4`: one program per token, the row stays in registers between maxima and rounding."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant_token import FLOATS, TINY
from ..quant_token_fp4 import BLOCK_LARGEST, LARGEST, ROW_LARGEST
from .quant_token import MAX_K
from .tiles import ROUND_EACH_STEP, await_inputs, overlap, round_to_e2m1, rows_contiguous


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


def limits(op: str, dtype: torch.dtype | None = None, k: int | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    if dtype is not None and dtype not in FLOATS:
        return f"dtype {dtype} is not supported"
    if k is not None and k > MAX_K:
        return f"K={k} is larger than {MAX_K}"
    return None


def supports(op: str, x: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors."""
    return limits(op, dtype=x.dtype, k=x.shape[1])


def launch_options(k: int) -> dict[str, int]:
    """Block size and warps for rows of length k: 16 to 32 elements per thread."""
    block = max(128, triton.next_power_of_2(k))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def run(op: str, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`quant_token_fp4` by Triton."""
    m, k = x.shape
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty((m,), dtype=torch.float32, device=x.device)
    if m:
        options = launch_options(k) | ROUND_EACH_STEP
        largest = ROW_LARGEST if group else LARGEST
        quant_token_fp4_kernel[(m,)](
            rows_contiguous(x), codes, scale, k, TINY=TINY, LARGEST=largest, BLOCK_LARGEST=float(BLOCK_LARGEST),
            GROUP=group, **options, **overlap(x.device),
        )  # fmt: skip
    return codes, scale
