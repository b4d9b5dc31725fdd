"""Triton twin of `quant_token`: one program per token, the row stays in registers between maximum and rounding."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant_token import FLOATS, TINY
from .tiles import ROUND_EACH_STEP, await_inputs, overlap, round_to_int8, rows_contiguous

MAX_K = 32768
"""Longest row kept in registers (64 elements per thread with 16 warps)."""


@triton.jit
def quant_token_kernel(x_ptr, codes_ptr, scale_ptr, K, TINY: tl.constexpr, BLOCK: tl.constexpr):
    """One token per program; BLOCK >= K."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    # tl.max drops nan: as inf it makes the scale, and so every output of this token, not finite.
    amax = tl.maximum(tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=0), TINY)
    tl.store(codes_ptr + row * K + k, round_to_int8(x * tl.div_rn(127.0, amax)), mask=k < K)
    tl.store(scale_ptr + row, tl.div_rn(amax, 127.0))


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


def launch_options(k: int, least: int = 1) -> dict[str, int]:
    """Block size, at least `least`, and warps for rows of length k: 16 to 32 elements per thread."""
    block = max(least, triton.next_power_of_2(k))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def quantize_by_token(
    kernel: Any, x: Tensor, dtype: torch.dtype = torch.int8, least: int = 1, **constants: Any
) -> tuple[Tensor, Tensor]:
    """Codes of `dtype` and scales of the rows of x by a kernel of one program per token."""
    m, k = x.shape
    codes = torch.empty((m, k), dtype=dtype, device=x.device)
    scale = torch.empty((m,), dtype=torch.float32, device=x.device)
    if m:
        # Fused, x * inverse + magic would skip the rounding of the product and move values that it puts on a tie.
        options = launch_options(k, least) | ROUND_EACH_STEP
        kernel[(m,)](rows_contiguous(x), codes, scale, k, **constants, **options, **overlap(x.device))
    return codes, scale


def run(op: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """`quant_token` by Triton."""
    return quantize_by_token(quant_token_kernel, x, TINY=TINY)
