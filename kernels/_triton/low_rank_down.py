"""Triton twins of `norm_down` and `act_down`: what the branch reads is made tile by tile, on its way to the dot.

Nothing here may depend on M: the order of the sums, and so a row's bits, follow from tile and instruction. For the same
reason no product is fused with a sum but where `tl.fma` says so.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm_quant import Norm
from ..quant_token import FLOATS
from .act_quant import activate
from .int8_linear import dot_dtype
from .row_moments import load_block, moments_of
from .rows import AMD, row_stride
from .tiles import INTERPRETED, ROUND_EACH_STEP, await_inputs, overlap, rows_contiguous

MAX_RANKS = 128
"""Ranks of a program: with more, others read the same rows again."""
MAX_PARTS = 8
"""Programs that share a tile's sum over K at most: tiles alone are too few to hide what each waits for."""
NORM_COLUMNS, ACT_COLUMNS = 384, 1152
"""About how many columns a part has; behind a norm, K is smaller."""


@triton.jit
def tanh(t):
    """To 2**-11, in one instruction."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def activate_fast(x, ACT: tl.constexpr):
    """`activate` for what is rounded to bfloat16 next: its sigmoids are (1 + tanh) / 2."""
    half = 0.5 * x
    if ACT == "gelu_tanh":
        x = tl.fma(half, tanh(x * tl.fma(x * x, 0.0356774081, 0.7978845608)), half)
    elif ACT == "silu" or ACT == "swiglu":
        x = tl.fma(half, tanh(half), half)
    else:
        x = activate(x, ACT)
    return x


@triton.jit
def slope_and_offset(
    shift_ptr, mod_scale_ptr, weight_ptr, bias_ptr, pre_scale_ptr, shift_at, mod_scale_at, k, K,
    HAS_MOD: tl.constexpr, AFFINE: tl.constexpr, HAS_PRE_SCALE: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """((xhat * weight + bias) * (1 + scale) + shift) * pre_scale as slope and offset of xhat, [1 or BM, BK] each."""
    slope = tl.full(k.shape, 1.0, tl.float32)
    offset = tl.zeros(k.shape, tl.float32)
    if HAS_PRE_SCALE:
        slope = load_block(pre_scale_ptr, 0, k, K, EVEN_K)
    if HAS_MOD:
        offset = load_block(shift_ptr, shift_at, k, K, EVEN_K) * slope
        slope = slope + load_block(mod_scale_ptr, mod_scale_at, k, K, EVEN_K) * slope
    if AFFINE > 1:
        offset = offset + load_block(bias_ptr, 0, k, K, EVEN_K) * slope
    if AFFINE > 0:
        slope = slope * load_block(weight_ptr, 0, k, K, EVEN_K)
    return slope, offset


@triton.jit
def add_product(acc, y, down_ptr, column, K, RANK, EVEN_K: tl.constexpr, DOT: tl.constexpr):
    """acc [BM, BR] + y [BM, BK] times the columns `column` [BK] of the rows of `down` that are this program's."""
    BR: tl.constexpr = acc.shape[1]
    # Rows beyond the edge repeat the last one: what becomes of them is never stored.
    rr = tl.minimum(tl.program_id(1) * BR + tl.arange(0, BR), RANK - 1)
    at = down_ptr + rr[None, :].to(tl.int64) * K + column[:, None]
    if EVEN_K:
        down = tl.load(at)
    else:
        down = tl.load(at, mask=column[:, None] < K, other=0.0)
    return tl.dot(y.to(DOT), down.to(DOT), acc, input_precision="ieee")


@triton.jit
def store_low(low_ptr, acc, M, RANK):
    """To low [M, RANK], or to this program's part of [PARTS, M, RANK]."""
    low_ptr += tl.program_id(2).to(tl.int64) * M * RANK
    rm = tl.program_id(0) * acc.shape[0] + tl.arange(0, acc.shape[0])
    rr = tl.program_id(1) * acc.shape[1] + tl.arange(0, acc.shape[1])
    at = low_ptr + rm.to(tl.int64)[:, None] * RANK + rr[None, :]
    tl.store(at, acc.to(low_ptr.dtype.element_ty), mask=(rm < M)[:, None] & (rr < RANK)[None, :])


@triton.jit(do_not_specialize=["M", "TOKENS"])
def norm_down_kernel(
    x_ptr, moments_ptr, shift_ptr, mod_scale_ptr, weight_ptr, bias_ptr, pre_scale_ptr, down_ptr, low_ptr, x_stride,
    shift_stride, mod_scale_stride, M, K, CHUNK, RANK, TOKENS,
    LAYER: tl.constexpr, HAS_MOD: tl.constexpr, AFFINE: tl.constexpr, HAS_PRE_SCALE: tl.constexpr,
    ONE_SAMPLE: tl.constexpr, EVEN_K: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """BM rows, BR ranks, CHUNK columns, a multiple of BK; ONE_SAMPLE: no tile crosses from one sample of TOKENS rows
    into the next. moments: of `moments_of`."""
    await_inputs()
    row = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), M - 1)
    at = row.to(tl.int64)[:, None] * x_stride
    column = tl.arange(0, BK)
    factor = tl.load(moments_ptr + row)[:, None]
    if LAYER:
        lead = tl.load(moments_ptr + M.to(tl.int64) + row)[:, None]
    if ONE_SAMPLE:
        sample = tl.full((1, 1), tl.program_id(0) * BM // TOKENS, tl.int64)
    else:
        sample = (row // TOKENS).to(tl.int64)[:, None]
    acc = tl.zeros((BM, BR), tl.float32)
    first = tl.program_id(2) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, K), BK):
        k = (start + column)[None, :]
        x = load_block(x_ptr, at, k, K, EVEN_K)
        if LAYER:
            y = tl.fma(x, tl.broadcast_to(factor, (BM, BK)), tl.broadcast_to(lead, (BM, BK)))
        else:
            y = x * factor
        slope, offset = slope_and_offset(
            shift_ptr, mod_scale_ptr, weight_ptr, bias_ptr, pre_scale_ptr, sample * shift_stride,
            sample * mod_scale_stride, k, K, HAS_MOD, AFFINE, HAS_PRE_SCALE, EVEN_K,
        )  # fmt: skip
        y = tl.fma(y, tl.broadcast_to(slope, (BM, BK)), tl.broadcast_to(offset, (BM, BK)))
        acc = add_product(acc, y, down_ptr, start + column, K, RANK, EVEN_K, DOT)
    store_low(low_ptr, acc, M, RANK)


@triton.jit(do_not_specialize=["M"])
def act_down_kernel(
    x_ptr, prefix_ptr, pre_scale_ptr, down_ptr, low_ptr, x_stride, prefix_stride, M, K, PREFIX, CHUNK, RANK,
    ACT: tl.constexpr, FAST: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_PRE_SCALE: tl.constexpr, EVEN_K: tl.constexpr,
    DOT: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM rows, BR ranks, CHUNK columns, a multiple of BK. EVEN_K: BK divides both PREFIX, the columns of the prefix,
    and K. FAST: for bfloat16, on NVIDIA's GPUs."""
    await_inputs()
    row = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), M - 1).to(tl.int64)[:, None]
    column = tl.arange(0, BK)
    first = tl.program_id(2) * CHUNK
    end = tl.minimum(first + CHUNK, K)
    acc = tl.zeros((BM, BR), tl.float32)
    if HAS_PREFIX:
        stop = tl.minimum(end, PREFIX)
        for start in range(first, stop, BK):
            k = (start + column)[None, :]
            y = load_block(prefix_ptr, row * prefix_stride, k, stop, EVEN_K)
            if HAS_PRE_SCALE:
                y = y * load_block(pre_scale_ptr, 0, k, stop, EVEN_K)
            acc = add_product(acc, y, down_ptr, start + column, K, RANK, EVEN_K, DOT)
        first = tl.maximum(first, PREFIX)
    for start in range(first, end, BK):
        k = (start + column)[None, :]
        y = load_block(x_ptr, row * x_stride - PREFIX, k, end, EVEN_K)
        if ACT == "swiglu" or ACT == "geglu":
            gate = load_block(x_ptr, row * x_stride + (K - 2 * PREFIX), k, end, EVEN_K)
            y = y * (activate_fast(gate, ACT) if FAST else activate(gate, ACT))
        else:
            y = activate_fast(y, ACT) if FAST else activate(y, ACT)
        if HAS_PRE_SCALE:
            y = y * load_block(pre_scale_ptr, 0, k, end, EVEN_K)
        acc = add_product(acc, y, down_ptr, start + column, K, RANK, EVEN_K, DOT)
    store_low(low_ptr, acc, M, RANK)


@triton.jit(do_not_specialize=["SIZE"])
def add_parts_kernel(parts_ptr, low_ptr, SIZE, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """low [SIZE]: the sum of fp32 [PARTS, SIZE], from the first part to the last."""
    await_inputs()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * SIZE.to(tl.int64) + at, mask=at < SIZE, other=0.0)
    tl.store(low_ptr + at, total.to(low_ptr.dtype.element_ty), mask=at < SIZE)


def limits(op: str, dtype: torch.dtype | None = None, **_: Any) -> str | None:
    """Why the kernels cannot take such an input; None when they can."""
    return None if dtype is None or dtype in FLOATS else f"dtype {dtype} is not supported"


def supports(op: str, *_: Any) -> str | None:
    """The ops have checked all that matters."""
    return None


def launch_options(rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps of a program; fp32 has no tensor cores at full precision and needs small tiles."""
    ranks = max(16, triton.next_power_of_2(rank))
    if dtype == torch.float32:
        return {"BM": 32, "BR": min(ranks, 32), "BK": 32, "num_warps": 4, "num_stages": 2}
    ranks = min(ranks, MAX_RANKS)
    stages = 4 if ranks <= 32 else 3 if ranks < MAX_RANKS else 2
    # with eight warps Hopper's product would split the ranks, and each half would make all of its input anew
    return {"BM": 64, "BR": ranks, "BK": 64, "num_warps": 4, "num_stages": stages}


def split(k: int, block: int, columns: int) -> tuple[int, int]:
    """Parts of a sum over K, of about so many columns, and the columns of one, a multiple of the block. K alone tells:
    not how many rows there are decides the order of a row's sum."""
    blocks = triton.cdiv(k, block)
    chunk = triton.cdiv(blocks, min(MAX_PARTS, max(1, k // columns)))
    return triton.cdiv(blocks, chunk), chunk * block


def parts_of(low: Tensor, parts: int) -> Tensor:
    """What the parts of a sum are written to: `low` itself where there is one."""
    return low if parts == 1 else low.new_empty((parts, *low.shape), dtype=torch.float32)


def added(parts: Tensor, low: Tensor) -> Tensor:
    """`low`, with the sum of the parts in it."""
    if parts is not low:
        block = 1024
        programs = (triton.cdiv(low.numel(), block),)
        add_parts_kernel[programs](parts, low, low.numel(), len(parts), block, num_warps=4, **overlap(low.device))
    return low


def rows_of(tensor: Tensor) -> Tensor:
    """The rows with contiguous elements, copied only when needed."""
    return tensor if tensor.stride(-1) == 1 else rows_contiguous(tensor)


def run_norm(x: Tensor, norm: Norm, pre_scale: Tensor | None, down: Tensor) -> Tensor:
    """`norm_down` by Triton."""
    (m, k), rank = x.shape, down.shape[0]
    low = torch.empty((m, rank), dtype=x.dtype, device=x.device)
    if m == 0:
        return low
    options, x = launch_options(rank, x.dtype), rows_of(x)
    shift, mod_scale = [rows_of(t) for t in norm.mod] or [x, x]
    weight, bias = [*(rows_contiguous(t) for t in norm.affine), x, x][:2]
    tokens = m // shift.shape[0] if norm.mod else m
    parts, chunk = split(k, options["BK"], NORM_COLUMNS)
    target = parts_of(low, parts)
    norm_down_kernel[triton.cdiv(m, options["BM"]), triton.cdiv(rank, options["BR"]), parts](
        x,
        moments_of(x, norm),
        shift,
        mod_scale,
        weight,
        bias,
        x if pre_scale is None else rows_contiguous(pre_scale),
        rows_contiguous(down),
        target,
        *(row_stride(t) for t in (x, shift, mod_scale)),
        m,
        k,
        chunk,
        rank,
        tokens,
        LAYER=norm.kind == "layer",
        HAS_MOD=bool(norm.mod),
        AFFINE=len(norm.affine),
        HAS_PRE_SCALE=pre_scale is not None,
        ONE_SAMPLE=tokens == m or tokens % options["BM"] == 0,
        EVEN_K=k % options["BK"] == 0,
        DOT=dot_dtype(x.dtype),
        **options,
        **ROUND_EACH_STEP,
        **overlap(x.device),
    )
    return added(target, low)


def run_act(x: Tensor, act: str, pre_scale: Tensor | None, down: Tensor, prefix: Tensor | None = None) -> Tensor:
    """`act_down` by Triton."""
    rank, k = down.shape
    low = torch.empty((len(x), rank), dtype=x.dtype, device=x.device)
    if len(x) == 0:
        return low
    options, x = launch_options(rank, x.dtype), rows_of(x)
    parts, chunk = split(k, options["BK"], ACT_COLUMNS)
    target = parts_of(low, parts)
    first = x if prefix is None else rows_of(prefix)
    width = 0 if prefix is None else prefix.shape[1]
    act_down_kernel[triton.cdiv(len(x), options["BM"]), triton.cdiv(rank, options["BR"]), parts](
        x,
        first,
        x if pre_scale is None else rows_contiguous(pre_scale),
        rows_contiguous(down),
        target,
        row_stride(x),
        row_stride(first),
        len(x),
        k,
        width,
        chunk,
        rank,
        ACT=act,
        FAST=x.dtype == torch.bfloat16 and not INTERPRETED and not AMD,
        HAS_PREFIX=prefix is not None,
        HAS_PRE_SCALE=pre_scale is not None,
        EVEN_K=k % options["BK"] == 0 and width % options["BK"] == 0,
        DOT=dot_dtype(x.dtype),
        **options,
        **ROUND_EACH_STEP,
        **overlap(x.device),
    )
    return added(target, low)


def run(op: str, *args: Any) -> Tensor:
    """`norm_down` of (x, norm, pre_scale, down) or `act_down` of (x, act, pre_scale, down, prefix)."""
    return run_norm(*args) if op == "norm_down" else run_act(*args)
