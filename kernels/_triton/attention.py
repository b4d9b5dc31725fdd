"""Triton twin of `attention`: online softmax in base 2 (Dao 2023, FlashAttention-2, arXiv 2307.08691).

A head of 72 channels, as of DiT-XL/2 and PixArt, is a main part of 64 and a tail of 16, of which 8 are masked: 80
columns where the next power of two would be 128.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int8_linear import dot_dtype
from .tiles import INTERPRETED

LOG2_E = 1.4426950408889634
HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def attend(
    acc, acc_tail, sums, top, q, q_tail, k_ptr, v_ptr, k_t, v_t, first, last, scale,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BN: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Fold the keys and values [first, last) into the running sums; without EVEN the last block is ragged."""
    rd = tl.arange(0, MAIN)
    rt = MAIN + tl.arange(0, TAIL)
    for start in range(first, last, BN):
        rn = start + tl.arange(0, BN)
        k_at = k_ptr + rn.to(tl.int64)[:, None] * k_t * 8
        v_at = v_ptr + rn.to(tl.int64)[:, None] * v_t * 8
        inside = (rn < last)[:, None]
        tail = (rt < HEAD)[None, :] if EVEN else (rt < HEAD)[None, :] & inside
        if EVEN:
            k = tl.load(k_at + rd[None, :])
            v = tl.load(v_at + rd[None, :])
        else:
            k = tl.load(k_at + rd[None, :], mask=inside, other=0.0)
            v = tl.load(v_at + rd[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, k.to(DOT).T)
        if HEAD > MAIN:
            k_tail = tl.load(k_at + rt[None, :], mask=tail, other=0.0)
            v_tail = tl.load(v_at + rt[None, :], mask=tail, other=0.0)
            scores = tl.dot(q_tail, k_tail.to(DOT).T, scores)
        if not EVEN:
            scores = tl.where((rn < last)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        decay = tl.exp2(top - higher)
        top = higher
        sums = sums * decay + tl.sum(p, 1)
        p = p.to(v_ptr.dtype.element_ty).to(DOT)
        acc = tl.dot(p, v.to(DOT), acc * decay[:, None])
        if HEAD > MAIN:
            acc_tail = tl.dot(p, v_tail.to(DOT), acc_tail * decay[:, None])
    return acc, acc_tail, sums, top


@triton.jit(do_not_specialize=["TQ", "TK", "HEADS"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, scale, TQ, TK, HEADS,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """BM queries of one head per program; `scale` holds log2(e), and the strides count vectors of 8 channels."""
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rd = tl.arange(0, MAIN)
    rt = MAIN + tl.arange(0, TAIL)
    inside = (rm < TQ)[:, None]
    q_at = q_ptr + (batch * q_b + head * q_h + rm.to(tl.int64)[:, None] * q_t) * 8
    q = tl.load(q_at + rd[None, :], mask=inside, other=0.0).to(DOT)
    q_tail = q
    if HEAD > MAIN:
        q_tail = tl.load(q_at + rt[None, :], mask=inside & (rt < HEAD)[None, :], other=0.0).to(DOT)
    k_ptr += (batch * k_b + head * k_h) * 8
    v_ptr += (batch * v_b + head * v_h) * 8
    acc = tl.zeros((BM, MAIN), dtype=tl.float32)
    acc_tail = tl.zeros((BM, TAIL), dtype=tl.float32)
    sums = tl.zeros((BM,), dtype=tl.float32)
    top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    whole = TK // BN * BN
    acc, acc_tail, sums, top = attend(
        acc, acc_tail, sums, top, q, q_tail, k_ptr, v_ptr, k_t, v_t, 0, whole, scale, HEAD, MAIN, TAIL, BN, True, DOT
    )
    if whole < TK:
        acc, acc_tail, sums, top = attend(
            acc, acc_tail, sums, top, q, q_tail, k_ptr, v_ptr, k_t, v_t, whole, TK, scale,
            HEAD, MAIN, TAIL, BN, False, DOT,
        )  # fmt: skip
    y_at = y_ptr + ((batch * TQ + rm) * HEADS + head)[:, None] * HEAD
    share = (1.0 / sums)[:, None]
    tl.store(y_at + rd[None, :], (acc * share).to(y_ptr.dtype.element_ty), mask=inside)
    if HEAD > MAIN:
        mask = inside & (rt < HEAD)[None, :]
        tl.store(y_at + rt[None, :], (acc_tail * share).to(y_ptr.dtype.element_ty), mask=mask)


def parts(head_dim: int) -> tuple[int, int] | None:
    """Main columns and tail columns, or None: a power of two, or one with a tail of at most 16."""
    main = 1 << (head_dim.bit_length() - 1)
    if main < 16 or main > 128 or head_dim % 8 or head_dim - main > 16:
        return None
    return main, 16


def limits(op: str, dtype: torch.dtype | None = None, head_dim: int | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    if dtype is not None and dtype not in HALVES and not INTERPRETED:
        return f"dtype {dtype} is not supported"
    if head_dim is not None and parts(head_dim) is None:
        return f"head_dim {head_dim} is not 16, 32, 64 or 128, nor 8 or 16 more"
    return None


def supports(op: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """`limits` of these tensors."""
    return limits(op, dtype=q.dtype, head_dim=q.shape[3])


def launch_options(head_dim: int, hopper: bool) -> dict[str, int]:
    """Tile, warps and stages; without Hopper's products from shared memory, 64 keys of 128 channels spill."""
    keys, stages = (32, 3) if head_dim > 96 and not hopper else (64, 2)
    return {"BM": 128, "BN": keys, "num_warps": 8, "num_stages": stages}


def in_vectors(x: Tensor) -> tuple[Tensor, list[int]]:
    """The same values in rows of whole 8-channel vectors, copied only when needed, and the strides in such vectors.

    Triton finds 16-byte loads through a stride that it knows to be a multiple of 8: a head of 72 is one, not of 16.
    """
    if x.stride(3) != 1 or any(stride % 8 for stride in x.stride()[:3]):
        x = x.contiguous()
    return x, [stride // 8 for stride in x.stride()[:3]]


def run(op: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attention` by Triton."""
    batch, tokens, heads, head_dim = q.shape
    y = torch.empty((batch, tokens, heads * head_dim), dtype=q.dtype, device=q.device)
    if y.numel():
        hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
        launch(y, q, k, v, scale, launch_options(head_dim, hopper))
    return y


def launch(y: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, options: dict[str, int]) -> None:
    """Run the kernel with these launch options."""
    batch, tokens, heads, head_dim = q.shape
    (q, q_strides), (k, k_strides), (v, v_strides) = in_vectors(q), in_vectors(k), in_vectors(v)
    main, tail = parts(head_dim) or (0, 0)
    attention_kernel[(triton.cdiv(tokens, options["BM"]), batch * heads)](
        q, k, v, y, scale * LOG2_E, tokens, k.shape[1], heads,
        *q_strides, *k_strides, *v_strides,
        HEAD=head_dim, MAIN=main, TAIL=tail, DOT=dot_dtype(q.dtype), **options,
    )  # fmt: skip
