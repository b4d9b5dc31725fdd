"""Triton twin of `codebook_to_int8`: the whole weight to an int8 scratch, which the kernels of the int8 ops then read.

An entry is moved as one word of its 1, 2 or 4 bytes, so a code costs one gather from a table of at most 1 KB.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook_decode import BITS
from ..quant_token import FLOATS
from .tiles import await_inputs, overlap, rows_contiguous

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@triton.jit
def codebook_to_int8_kernel(
    w_ptr, book_ptr, table_ptr, group_ptr, out_ptr, N, C, TABLES, BITS: tl.constexpr, HAS_TABLE: tl.constexpr,
    GROUP: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Decode R rows x B codes per program; C codes a row; GROUP is 0 without group scales."""
    await_inputs()
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    safe = tl.minimum(rows, N - 1)[:, None]
    rc = tl.program_id(1) * B + tl.arange(0, B)
    inside = (rc < C)[None, :]
    width = tl.cdiv(C * BITS, 8)
    byte = rc * BITS // 8
    at = w_ptr + safe * width + byte[None, :]
    word = tl.load(at, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        # A code may end in the next byte.
        word |= tl.load(at + 1, mask=inside & (byte + 1 < width)[None, :], other=0).to(tl.int32) << 8
    code = (word >> (rc * BITS % 8)[None, :]) & ((1 << BITS) - 1)
    if HAS_TABLE:
        table = tl.minimum(tl.load(table_ptr + safe).to(tl.int32), TABLES - 1)
        code += table * (1 << BITS)
    value = tl.load(book_ptr + code, mask=inside, other=0)
    if GROUP > 0:
        scale = tl.load(group_ptr + safe * (C // GROUP) + (rc // GROUP)[None, :], mask=inside, other=0)
        wide = (value.to(tl.int32) * scale.to(tl.int32) + 64) >> 7
        value = tl.minimum(tl.maximum(wide, -127), 127).to(tl.int8)
    tl.store(out_ptr + rows[:, None] * C + rc[None, :], value, mask=(rows < N)[:, None] & inside)


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


def launch_options(codes: int) -> dict[str, int]:
    """R rows x B codes a program."""
    return {"R": 4, "B": 128 if codes <= 256 else 512, "num_warps": 4}


def run(op: str, weight: Tensor, codebook: Tensor, table: Tensor | None, group_scale: Tensor | None, k: int) -> Tensor:
    """`codebook_to_int8` by Triton."""
    n, (tables, entries, length) = weight.shape[0], codebook.shape
    codes = k // length
    out = torch.empty((n, codes), dtype=WORDS[length], device=weight.device)
    if n:
        options = launch_options(codes)
        blocks = (triton.cdiv(n, options["R"]), triton.cdiv(codes, options["B"]))
        weight = rows_contiguous(weight)
        words = rows_contiguous(codebook).view(WORDS[length])
        codebook_to_int8_kernel[blocks](
            weight, words, weight if table is None else table,
            weight if group_scale is None else rows_contiguous(group_scale), out, n, codes, tables,
            BITS=BITS[entries], HAS_TABLE=table is not None,
            GROUP=0 if group_scale is None else k // group_scale.shape[1], **options, **overlap(weight.device),
        )  # fmt: skip
    return out.view(torch.int8)
