"""Triton twin of `int4_to_int8`: the whole weight at once, eight codes to a 32-bit word.

Rows and groups are consecutive in memory, so that a weight is one flat run of words whose group is the word's index
divided by the words in a group: any number of weights that lie behind one another take one launch.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_table
from ..quant_token import FLOATS
from .tiles import await_inputs, overlap, rows_contiguous

OP = "int4_to_int8"
TUNABLE = (OP,)
ANY_M = True  # the number of tokens does not matter
MEASURED_GROUP = 64
"""Channels that share a group scale in what is measured: those of the recipes."""


@triton.jit
def decode_bytes(packed, group_ptr, rows, columns, first_group, GROUP: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """uint8 [R, B] -> int8 [R, 2B] in k order; GROUP is 0 without group scales, else it divides 2B."""
    signed = packed.to(tl.int8, bitcast=True)
    both = tl.interleave((signed << 4) >> 4, signed >> 4)
    if GROUP > 0:
        COUNT: tl.constexpr = 2 * B // GROUP
        groups = first_group + tl.arange(0, COUNT)
        at = group_ptr + rows[:, None] * columns + groups[None, :]
        scale = tl.load(at, mask=groups[None, :] < columns, other=0).to(tl.int16)
        wide = tl.reshape(both, (R, COUNT, GROUP)).to(tl.int16) * scale[:, :, None]
        both = tl.reshape(((wide + 8) >> 4).to(tl.int8), (R, 2 * B))
    return both


@triton.jit
def int4_bytes_kernel(w_ptr, group_ptr, out_ptr, N, K, GROUP: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """Decode R rows x 2B columns per program, for any K."""
    await_inputs()
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    safe = tl.minimum(rows, N - 1)
    width = (K + 1) // 2
    rb = tl.program_id(1) * B + tl.arange(0, B)
    packed = tl.load(w_ptr + safe[:, None] * width + rb[None, :], mask=rb[None, :] < width, other=0)
    decoded = decode_bytes(
        packed, group_ptr, safe, K // max(GROUP, 1), tl.program_id(1) * (2 * B // max(GROUP, 1)), GROUP, R, B
    )
    rk = tl.program_id(1) * 2 * B + tl.arange(0, 2 * B)
    tl.store(out_ptr + rows[:, None] * K + rk[None, :], decoded, mask=(rows < N)[:, None] & (rk < K)[None, :])


@triton.jit
def scale_lanes(lanes, scale):
    """(q * scale + 8) >> 4 of two codes at once, each in bits 8 to 15 of its 16-bit lane.

    lanes: u = q + 8 of two codes, times 16, in two lanes; scale: unsigned 8 bit. A lane holds
    16 * (u * scale - 8 * scale + 8) = 16 * (q * scale + 8), within +-2^15, and 8 more: where the lower lane is negative
    it borrows one from the upper lane, which then still has 7 to give.
    """
    return lanes * scale + ((8 - 8 * scale) * 0x00100010 + 0x00080008)


@triton.jit
def extend_bytes(nibbles):
    """Four nibbles, one in the low half of each byte, sign-extended to bytes."""
    return nibbles | ((nibbles & 0x08080808) * 0x1E)


@triton.jit
def decode_words(words, scale, GROUPED: tl.constexpr):
    """int32 [B] of eight codes each -> two int32 [B]: the int8 values of the first four and of the last four."""
    if GROUPED:
        biased = words ^ -0x77777778
        c0 = scale_lanes((biased << 4) & 0x00F000F0, scale)
        c1 = scale_lanes(biased & 0x00F000F0, scale)
        c2 = scale_lanes((biased >> 4) & 0x00F000F0, scale)
        c3 = scale_lanes((biased >> 8) & 0x00F000F0, scale)
        # Lane 0 of these is one of the first four codes, lane 1 one of the last four.
        even = ((c0 >> 8) & 0x00FF00FF) | (c1 & -0x00FF0100)
        odd = ((c2 >> 8) & 0x00FF00FF) | (c3 & -0x00FF0100)
        return (even & 0xFFFF) | (odd << 16), ((even >> 16) & 0xFFFF) | (odd & -0x10000)
    low = extend_bytes(words & 0x0F0F0F0F)
    high = extend_bytes((words >> 4) & 0x0F0F0F0F)
    first = (low & 0xFF) | ((high & 0xFF) << 8) | ((low & 0xFF00) << 8) | ((high & 0xFF00) << 16)
    last = ((low >> 16) & 0xFF) | ((high >> 8) & 0xFF00) | ((low >> 8) & 0xFF0000) | (high & -0x1000000)
    return first, last


@triton.jit
def int4_words_kernel(w_ptr, group_ptr, out_ptr, WORDS, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Decode BLOCK words of eight codes per program."""
    await_inputs()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WORDS
    words = tl.load(w_ptr.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0, eviction_policy="evict_first")
    scale = words
    if GROUP > 0:
        scale = tl.load(group_ptr + at // (GROUP // 8), mask=inside, other=0).to(tl.int32)
    first, last = decode_words(words, scale, GROUP > 0)
    to = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + to, tl.interleave(first, last), mask=to < 2 * WORDS)


def limits(op: str, dtype: torch.dtype | None = None, group: int | None = None, **_: Any) -> str | None:
    """Why the kernels cannot take such an input; None when they can."""
    if dtype is not None and dtype not in (*FLOATS, torch.int8, torch.uint8):
        return f"dtype {dtype} is not supported"
    if group is not None and group not in (16, 32, 64, 128):
        return f"groups of {group} are not supported"
    return None


def supports(op: str, weight: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors; the op has checked the groups."""
    return limits(op, dtype=weight.dtype)


def bytes_options(k: int) -> dict[str, int]:
    """Block of the kernel for any K: 2B values, a multiple of every group, of R rows."""
    return {"R": 16, "B": 64 if k <= 256 else 256, "num_warps": 4}


def words_options(words: int) -> dict[str, int]:
    """Words per program, as measured on an H200: 16 bytes a thread twice, or once for less than 6 million codes, which
    would leave part of the GPU idle."""
    return {"BLOCK": 512 if 8 * words < 6_000_000 else 1024, "num_warps": 4}


def candidates(op: str, m: int, n: int, k: int) -> list[dict[str, int]]:
    """Launch options worth measuring."""
    return [{"BLOCK": block, "num_warps": warps} for warps in (4, 8) for block in (512, 1024, 2048, 4096)]


def measured_group(k: int) -> int:
    """Channels that share a group scale in an `example`; 0 where none fit."""
    return 0 if k % MEASURED_GROUP else MEASURED_GROUP


def facts(op: str, m: int, k: int) -> dict[str, int]:
    """What the options depend on beside the shape, for an `example`."""
    return {"group": measured_group(k)}


def example(op: str, m: int, n: int, k: int, device: torch.device) -> tuple[Any, ...]:
    """Random arguments of the op."""
    group = measured_group(k)
    group_scale = torch.randint(0, 256, (n, k // group), device=device).to(torch.uint8) if group else None
    return torch.randint(0, 256, (n, (k + 1) // 2), device=device).to(torch.uint8), group_scale, k


def group_of(k: int, group_scale: Tensor | None) -> int:
    """Channels that share a group scale; 0 without group scales."""
    return 0 if group_scale is None else k // group_scale.shape[1]


def decode(weight: Tensor, group_scale: Tensor | None, k: int) -> Tensor:
    """Launch the kernel that this K allows."""
    n = weight.shape[0]
    out = torch.empty((n, k), dtype=torch.int8, device=weight.device)
    if n == 0:
        return out
    weight, group = rows_contiguous(weight), group_of(k, group_scale)
    group_ptr = weight if group_scale is None else rows_contiguous(group_scale)
    # Storage can start anywhere, for example in a memory-mapped file; words cannot.
    if k % 8 == 0 and weight.data_ptr() % 16 == 0:
        words = n * k // 8
        options = launch_table.lookup(OP, weight.device, 1, n, k, group=group) or words_options(words)
        int4_words_kernel[(triton.cdiv(words, options["BLOCK"]),)](
            weight, group_ptr, out, words, GROUP=group, **options, **overlap(weight.device)
        )
    else:
        options = bytes_options(k)
        blocks = (triton.cdiv(n, options["R"]), triton.cdiv(k, 2 * options["B"]))
        int4_bytes_kernel[blocks](weight, group_ptr, out, n, k, GROUP=group, **options, **overlap(weight.device))
    return out


def run(op: str, weight: Tensor, group_scale: Tensor | None, k: int) -> Tensor:
    """`int4_to_int8` by Triton."""
    return decode(weight, group_scale, k)
