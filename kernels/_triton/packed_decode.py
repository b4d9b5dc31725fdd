"""Triton twin of `packed_to_int8`: the whole weight to an int8 scratch, which the kernels of the int8 ops then read."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant_token import FLOATS
from .tiles import await_inputs, overlap, rows_contiguous


@triton.jit
def packed_to_int8_kernel(
    w_ptr, group_ptr, out_ptr, N, K, BITS: tl.constexpr, ODD: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Decode R rows x B columns per program; GROUP is 0 without group scales."""
    await_inputs()
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    safe = tl.minimum(rows, N - 1)[:, None]
    rk = tl.program_id(1) * B + tl.arange(0, B)
    inside = (rk < K)[None, :]
    width = tl.cdiv(K, 8) * BITS
    byte = rk * BITS // 8
    first = rk * BITS % 8
    at = w_ptr + safe * width + byte[None, :]
    word = tl.load(at, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        # A code may end in the next byte.
        word |= tl.load(at + 1, mask=inside & (byte + 1 < width)[None, :], other=0).to(tl.int32) << 8
    value = (word << (32 - BITS - first)[None, :]) >> (32 - BITS)
    if ODD:
        value = 2 * value + 1
    if GROUP > 0:
        scale = tl.load(group_ptr + safe * (K // GROUP) + (rk // GROUP)[None, :], mask=inside, other=0)
        SHIFT: tl.constexpr = BITS + 1 if ODD else BITS
        value = (value * scale.to(tl.int32) + (1 << (SHIFT - 1))) >> SHIFT
    tl.store(out_ptr + rows[:, None] * K + rk[None, :], value.to(tl.int8), mask=(rows < N)[:, None] & inside)


def limits(op: str, dtype: torch.dtype | None = None, group: int | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    if dtype is not None and dtype not in (*FLOATS, torch.int8, torch.uint8):
        return f"dtype {dtype} is not supported"
    if group is not None and group not in (16, 32, 64, 128):
        return f"groups of {group} are not supported"
    return None


def supports(op: str, weight: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors; the op has checked the groups."""
    return limits(op, dtype=weight.dtype)


def launch_options(k: int) -> dict[str, int]:
    """R rows x B columns a program."""
    return {"R": 4, "B": 128 if k <= 256 else 512, "num_warps": 4}


def run(op: str, weight: Tensor, group_scale: Tensor | None, k: int, bits: int, odd: bool) -> Tensor:
    """`packed_to_int8` by Triton."""
    n = weight.shape[0]
    out = torch.empty((n, k), dtype=torch.int8, device=weight.device)
    if n:
        options = launch_options(k)
        blocks = (triton.cdiv(n, options["R"]), triton.cdiv(k, options["B"]))
        weight = rows_contiguous(weight)
        group_ptr = weight if group_scale is None else rows_contiguous(group_scale)
        group = 0 if group_scale is None else k // group_scale.shape[1]
        packed_to_int8_kernel[blocks](
            weight, group_ptr, out, n, k, BITS=bits, ODD=odd, GROUP=group, **options, **overlap(weight.device)
        )
    return out
