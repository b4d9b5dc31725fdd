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


@triton.jit
def code_at(first, second, third, I: tl.constexpr, BITS: tl.constexpr):
    """Code I of a unit: one word of 2-, 4- or 8-bit codes, or three words of sixteen 6-bit codes."""
    MASK: tl.constexpr = (1 << BITS) - 1
    WORD: tl.constexpr = I * BITS // 32
    SHIFT: tl.constexpr = I * BITS % 32
    word = first if WORD == 0 else (second if WORD == 1 else third)
    if SHIFT + BITS <= 32:
        code = (word >> SHIFT) & MASK
    else:
        after = second if WORD == 0 else third
        code = ((word >> SHIFT) & ((1 << (32 - SHIFT)) - 1)) | ((after << (32 - SHIFT)) & MASK)
    return code


@triton.jit
def decoded_word(
    book_ptr, first, second, third, base, I: tl.constexpr, BITS: tl.constexpr, LENGTH: tl.constexpr
):  # fmt: skip
    """int32 [BLOCK]: the four values from code I on."""
    found = tl.load(book_ptr + (base + code_at(first, second, third, I, BITS)))
    if LENGTH < 4:
        WIDTH: tl.constexpr = 8 * LENGTH
        found = found.to(tl.int32) & ((1 << WIDTH) - 1)
        for j in tl.static_range(1, 4 // LENGTH):
            value = tl.load(book_ptr + (base + code_at(first, second, third, I + j, BITS))).to(tl.int32)
            found |= (value & ((1 << WIDTH) - 1)) << (j * WIDTH)
    return found


@triton.jit
def decoded_words(
    book_ptr, first, second, third, base, I: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """int32 [COUNT * BLOCK]: COUNT words of every unit, a power of two, the STEP-th ones from word I on."""
    if COUNT == 1:
        words = decoded_word(book_ptr, first, second, third, base, I * 4 // LENGTH, BITS, LENGTH)
    else:
        words = tl.interleave(
            decoded_words(book_ptr, first, second, third, base, I, 2 * STEP, COUNT // 2, BITS, LENGTH),
            decoded_words(book_ptr, first, second, third, base, I + STEP, 2 * STEP, COUNT // 2, BITS, LENGTH),
        )
    return words


@triton.jit
def codebook_words_kernel(
    w_ptr, book_ptr, table_ptr, out_ptr, UNITS, ROW_UNITS, TABLES, BITS: tl.constexpr, LENGTH: tl.constexpr,
    HAS_TABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode BLOCK units per program, see `code_at`; rows are whole units, so that a weight is one flat run of them."""
    await_inputs()
    WORDS: tl.constexpr = 16 * LENGTH // 4 if BITS == 6 else 32 // BITS * LENGTH // 4
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < UNITS
    word_ptr = w_ptr.to(tl.pointer_type(tl.int32))
    if BITS == 6:
        first = tl.load(word_ptr + 3 * at, mask=inside, other=0)
        second = tl.load(word_ptr + 3 * at + 1, mask=inside, other=0)
        third = tl.load(word_ptr + 3 * at + 2, mask=inside, other=0)
    else:
        first = tl.load(word_ptr + at, mask=inside, other=0)
        second = first
        third = first
    base = tl.zeros((BLOCK,), dtype=tl.int32)
    if HAS_TABLE:
        # In 32 bits where they are enough: a division takes three times as long in 64.
        row = at.to(UNITS.dtype) // ROW_UNITS
        table = tl.load(table_ptr + row, mask=inside, other=0).to(tl.int32)
        base = tl.minimum(table, TABLES - 1) << BITS
    values = decoded_words(book_ptr, first, second, third, base, 0, 1, WORDS, BITS, LENGTH)
    to = tl.program_id(0).to(tl.int64) * (WORDS * BLOCK) + tl.arange(0, WORDS * BLOCK)
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + to, values, mask=to < WORDS * UNITS.to(tl.int64))


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


def words_options(words: int) -> dict[str, int]:
    """Units a program, for units that decode to so many words: 16 bytes a thread at least."""
    return {"BLOCK": max(128, 512 // words), "num_warps": 4}


def units_of(codes: int, bits: int) -> int:
    """Units of `codes` codes, a row; 0 where a row ends inside of one."""
    per_unit = 16 if bits == 6 else 32 // bits
    return 0 if codes % per_unit else codes // per_unit


def run(op: str, weight: Tensor, codebook: Tensor, table: Tensor | None, group_scale: Tensor | None, k: int) -> Tensor:
    """`codebook_to_int8` by Triton."""
    n, (tables, entries, length) = weight.shape[0], codebook.shape
    codes = k // length
    out = torch.empty((n, codes), dtype=WORDS[length], device=weight.device)
    weight, words = rows_contiguous(weight), rows_contiguous(codebook).view(WORDS[length])
    units = units_of(codes, BITS[entries]) if group_scale is None and k % 4 == 0 else 0
    # Storage can start anywhere, for example in a memory-mapped file; words cannot.
    if n and units and weight.data_ptr() % 16 == 0:
        options = words_options(k // units // 4)
        codebook_words_kernel[(triton.cdiv(n * units, options["BLOCK"]),)](
            weight, words, weight if table is None else table, out, n * units, units, tables, BITS=BITS[entries],
            LENGTH=length, HAS_TABLE=table is not None, **options, **overlap(weight.device),
        )  # fmt: skip
    elif n:
        options = launch_options(codes)
        blocks = (triton.cdiv(n, options["R"]), triton.cdiv(codes, options["B"]))
        codebook_to_int8_kernel[blocks](
            weight, words, weight if table is None else table,
            weight if group_scale is None else rows_contiguous(group_scale), out, n, codes, tables,
            BITS=BITS[entries], HAS_TABLE=table is not None,
            GROUP=0 if group_scale is None else k // group_scale.shape[1], **options, **overlap(weight.device),
        )  # fmt: skip
    return out.view(torch.int8)
