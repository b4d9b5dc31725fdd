"""Triton twin of `attention`: one program for a tile of queries of one head, all keys in a loop.

A head of 72 channels is a tile of 64 and one of 16, of which half is masked: tiles are powers of two, and 128, to which
others pad, would be nearly half zeros. So are 80, 88, 96, ... channels. The kernel here is made for few keys; for many,
and heads of 64 to 96 channels, Hopper has its own in `attention_hopper.py`.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import math
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant_token import FLOATS
from .gluon_files import GluonFile
from .tiles import COMPILED, await_inputs, overlap

SMALLEST, LARGEST = 16, 128
"""Channels of a head."""
FEW, MANY = 512, 2048
"""Keys: the most for which the kernel here can pay, the least for which Hopper's can."""
SMALL = 16384
"""Queries of all heads that do not fill a GPU."""

HOPPER = GluonFile("attention_hopper", "attention runs without the Hopper kernel", hopper=True)


@triton.jit
def part(base, rows, stride, limit, ALIGN: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[rows, WIDTH] of a head: its channels from FIRST on, zeros outside the tensor."""
    c = FIRST + tl.arange(0, WIDTH)
    mask = (rows < limit)[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (c < D)[None, :]
    at = tl.multiple_of(rows.to(tl.int64) * stride, ALIGN)
    x = tl.load(base + at[:, None] + c[None, :], mask=mask, other=0.0)
    return x if COMPILED else x.to(tl.float32)


@triton.jit
def store_part(base, x, rows, stride, limit, FIRST: tl.constexpr, D: tl.constexpr):
    c = FIRST + tl.arange(0, x.shape[1])
    mask = (rows < limit)[:, None] & (c < D)[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] * stride + c[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "mask_b"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, scale, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, mask_b, mask_s,
    T, S, HEADS, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HAS_MASK: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Queries program_id(0) * BM on, of head program_id(1) of batch row program_id(2). scale: log2(e) / sqrt(d).
    Strides are multiples of ALIGN elements, as the start of each tensor is."""
    await_inputs()
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_ptr += tl.multiple_of(batch * q_b + head * q_h, ALIGN)
    k_ptr += tl.multiple_of(batch * k_b + head * k_h, ALIGN)
    v_ptr += tl.multiple_of(batch * v_b + head * v_h, ALIGN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    q1 = part(q_ptr, m, q_t, T, ALIGN, 0, D1, D)
    acc1 = tl.zeros((BM, D1), tl.float32)
    if D2 > 0:
        q2 = part(q_ptr, m, q_t, T, ALIGN, D1, D2, D)
        acc2 = tl.zeros((BM, D2), tl.float32)
    largest = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, S, BN):
        keys = start + n
        s = tl.dot(q1, tl.trans(part(k_ptr, keys, k_s, S, ALIGN, 0, D1, D)), input_precision="ieee")
        if D2 > 0:
            s = tl.dot(q2, tl.trans(part(k_ptr, keys, k_s, S, ALIGN, D1, D2, D)), s, input_precision="ieee")
        s *= scale
        if HAS_MASK:
            added = tl.load(mask_ptr + batch * mask_b + keys * mask_s, mask=keys < S, other=0.0).to(tl.float32)
            s += added[None, :] * 1.4426950408889634
        s = tl.where((keys < S)[None, :], s, float("-inf"))
        above = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - above[:, None])
        shrink = tl.exp2(largest - above)
        total = total * shrink + tl.sum(p, 1)
        largest = above
        if COMPILED:
            p = p.to(v_ptr.dtype.element_ty)
        acc1 *= shrink[:, None]
        acc1 = tl.dot(p, part(v_ptr, keys, v_s, S, ALIGN, 0, D1, D), acc1, input_precision="ieee")
        if D2 > 0:
            acc2 *= shrink[:, None]
            acc2 = tl.dot(p, part(v_ptr, keys, v_s, S, ALIGN, D1, D2, D), acc2, input_precision="ieee")
    o_ptr += (batch * T * HEADS + head) * D
    store_part(o_ptr, acc1 / total[:, None], m, HEADS * D, T, 0, D)
    if D2 > 0:
        store_part(o_ptr, acc2 / total[:, None], m, HEADS * D, T, D1, D)


def limits(op: str, dtype: torch.dtype | None = None, head_dim: int | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    if dtype is not None and dtype not in FLOATS:
        return f"dtype {dtype} is not supported"
    if head_dim is not None and not (SMALLEST <= head_dim <= LARGEST and head_dim % 8 == 0):
        return f"heads have {head_dim} channels, not a multiple of 8 from {SMALLEST} to {LARGEST}"
    return None


def note(op: str, device: torch.device, **_: Any) -> str | None:
    """For `dispatch.explain`: why the Hopper kernel is left out on a GPU that it is made for."""
    return HOPPER.note(device)


def supports(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """`limits` of these tensors."""
    if mask is not None and mask.shape[1:3] != (1, 1):
        return "the mask is not one for keys alone"
    return limits(op, dtype=q.dtype, head_dim=q.shape[3])


def hopper_for(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> ModuleType | None:
    """The Hopper kernel, if it takes these tensors."""
    if mask is not None or q.dtype == torch.float32 or not 64 <= q.shape[3] <= 96 or k.shape[1] < MANY:
        return None
    found = HOPPER.on(q.device)
    return None if found is None or found.refusal(q, k, v) is not None else found


def faster(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether these kernels were measured to be faster than torch's on Hopper: for many keys, for few that are masked,
    and for few where there is little to do at all."""
    b, t, h, _ = q.shape
    if supports("attention", q, k, v, mask) is not None:
        return False
    if k.shape[1] <= FEW:
        return mask is not None or b * h * t <= SMALL
    return hopper_for(q, k, v, mask) is not None


def launch_options(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Widths of the two tiles of a head, tile of queries and keys, warps and stages."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    widths = {"D1": first, "D2": max(SMALLEST, triton.next_power_of_2(rest)) if rest else 0}
    if dtype == torch.float32:
        return {**widths, "BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
    return {**widths, "BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3 if head_dim <= 96 else 2}


def run(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` by Triton, on Hopper where it pays by Gluon."""
    out = q.new_empty((q.shape[0] * q.shape[1], q.shape[2] * q.shape[3]))
    hopper = hopper_for(q, k, v, mask)
    if hopper is not None:
        try:
            hopper.launch(q, k, v, out)
            return out
        except Exception as error:
            HOPPER.leave(q.device, error)
    if out.numel():
        _launch(q, k, v, mask, out)
    return out


def _launch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor) -> None:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    (b, t, h, d), s = q.shape, k.shape[1]
    given = q if mask is None else mask.expand(b, 1, 1, s)
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    starts = [x.data_ptr() for x in (q, k, v)]
    align = 8 if all(x % 8 == 0 for x in strides) and all(x % 16 == 0 for x in starts) else 1
    options = launch_options(d, q.dtype)
    attention_kernel[(triton.cdiv(t, options["BM"]), h, b)](
        q, k, v, given, out, math.log2(math.e) / math.sqrt(d), *strides, given.stride(0), given.stride(3), t, s, h,
        D=d, HAS_MASK=mask is not None, ALIGN=align, **options, **overlap(q.device),
    )  # fmt: skip
