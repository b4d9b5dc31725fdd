"""Triton twin of `head_norm_rope`: one program per token, its q, k and v each read and written once."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant_token import FLOATS
from .tiles import await_inputs, overlap, rows_contiguous

MAX_WIDTH = 16384
"""Most channels of q that one program keeps in registers."""


@triton.jit
def mean_of(x, HEADS, HEAD, ALL: tl.constexpr):
    """The mean of each row of a [heads, channels] tile, or with ALL of the whole tile, to be broadcast over it."""
    if ALL:
        mean = tl.full((1, 1), tl.sum(tl.sum(x, 1), 0) / (HEADS * HEAD), tl.float32)
    else:
        mean = (tl.sum(x, 1) / HEAD)[:, None]
    return mean


@triton.jit
def load_affine(ptr, at, mask, HEAD, ALL: tl.constexpr):
    """A weight or bias in fp32, to be broadcast over a [heads, channels] tile."""
    if ALL:
        found = tl.load(ptr + at, mask=mask, other=0.0)
    else:
        c = tl.arange(0, at.shape[1])
        found = tl.load(ptr + c, mask=c < HEAD, other=0.0)[None, :]
    return found.to(tl.float32)


@triton.jit
def normed(x, weight_ptr, bias_ptr, at, mask, eps, HEADS, HEAD, LAYER: tl.constexpr, ALL: tl.constexpr):
    """RMSNorm, or LAYER norm, of a [heads, channels] tile over each row, or with ALL over the whole tile."""
    if LAYER:
        x = tl.where(mask, x - mean_of(x, HEADS, HEAD, ALL), 0.0)
    x = x * tl.rsqrt(mean_of(x * x, HEADS, HEAD, ALL) + eps) * load_affine(weight_ptr, at, mask, HEAD, ALL)
    if LAYER:
        x += load_affine(bias_ptr, at, mask, HEAD, ALL)
    return x


@triton.jit
def rotated(x, cos, sin):
    """Rotate the pairs (x[2i], x[2i+1]) by the angles of one token."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    cos_even, cos_odd = tl.split(tl.reshape(cos, (cos.shape[0] // 2, 2)))
    sin_even, sin_odd = tl.split(tl.reshape(sin, (sin.shape[0] // 2, 2)))
    first = even * cos_even[None, :] - odd * sin_even[None, :]
    second = odd * cos_odd[None, :] + even * sin_odd[None, :]
    return tl.reshape(tl.join(first, second), (x.shape[0], x.shape[1]))


@triton.jit(do_not_specialize=["TOKENS", "OFFSET", "BATCHES"])
def head_norm_rope_kernel(
    x_ptr, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, cos_ptr, sin_ptr, y_ptr, eps, x_b, x_t, TOKENS, OFFSET,
    BATCHES, HEADS: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr, ALL: tl.constexpr,
    ROPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Token program_id(0) of batch row program_id(1); it becomes token OFFSET + program_id(0) of TOKENS."""
    await_inputs()
    token = OFFSET + tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    mask = (r < HEADS)[:, None] & (c < HEAD)[None, :]
    at = r[:, None] * HEAD + c[None, :]
    x_ptr += batch * x_b + tl.program_id(0).to(tl.int64) * x_t
    y_ptr += (batch * TOKENS + token) * (HEADS * HEAD)
    part = BATCHES.to(tl.int64) * TOKENS * (HEADS * HEAD)
    q = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(x_ptr + HEADS * HEAD + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x_ptr + 2 * HEADS * HEAD + at, mask=mask, other=0.0)
    if NORM:
        q = normed(q, q_weight_ptr, q_bias_ptr, at, mask, eps, HEADS, HEAD, LAYER, ALL)
        k = normed(k, k_weight_ptr, k_bias_ptr, at, mask, eps, HEADS, HEAD, LAYER, ALL)
    if ROPE:
        cos = tl.load(cos_ptr + token * HEAD + c, mask=c < HEAD, other=0.0)
        sin = tl.load(sin_ptr + token * HEAD + c, mask=c < HEAD, other=0.0)
        q = rotated(q, cos, sin)
        k = rotated(k, cos, sin)
    tl.store(y_ptr + at, q.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + part + at, k.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + 2 * part + at, v, mask=mask)


def limits(op: str, dtype: torch.dtype | None = None, width: int | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    if dtype is not None and dtype not in FLOATS:
        return f"dtype {dtype} is not supported"
    if width is not None and width > MAX_WIDTH:
        return f"H * hd = {width} is larger than {MAX_WIDTH}"
    return None


def supports(op: str, qkv: Tensor, *rest: Any) -> str | None:
    """`limits` of these tensors."""
    heads = rest[4]
    rows, columns = tile(heads, qkv.shape[2] // (3 * heads))
    return limits(op, dtype=qkv.dtype, width=rows * columns)


def tile(heads: int, head_dim: int) -> tuple[int, int]:
    """Rows and columns that hold all heads of a token."""
    return triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)


def launch_options(heads: int, head_dim: int) -> dict[str, int]:
    """Tile and warps: 16 to 32 channels of q, k and v each per thread."""
    rows, columns = tile(heads, head_dim)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(16, max(1, rows * columns // 1024))}


def run(
    op: str,
    qkv: Tensor,
    weights: list[Tensor],
    other: Tensor | None,
    other_weights: list[Tensor],
    rope: list[Tensor],
    heads: int,
    eps: float,
) -> Tensor:
    """`head_norm_rope` by Triton: one launch a stream."""
    streams = [(qkv, weights)] if other is None else [(qkv, weights), (other, other_weights)]
    batch, tokens = qkv.shape[0], sum(x.shape[1] for x, _ in streams)
    head_dim = qkv.shape[2] // (3 * heads)
    y = torch.empty((3, batch, tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    cos, sin = (rows_contiguous(table) for table in rope) if rope else (y, y)
    offset = 0
    for x, own in streams:
        x = x if x.stride(2) == 1 else x.contiguous()
        affine = [*map(rows_contiguous, own), y, y, y, y][:4]
        if x.numel():
            head_norm_rope_kernel[(x.shape[1], batch)](
                x, *affine, cos, sin, y, eps, x.stride(0), x.stride(1), tokens, offset, batch,
                HEADS=heads, HEAD=head_dim, NORM=bool(own), LAYER=len(own) > 2,
                ALL=bool(own) and own[0].shape[0] > head_dim,
                ROPE=bool(rope), **launch_options(heads, head_dim), **overlap(x.device),
            )  # fmt: skip
        offset += x.shape[1]
    return y
