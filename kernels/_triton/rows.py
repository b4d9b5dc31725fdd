"""Pieces of the fused producers: tiles of whole tokens in registers, their sums, rotation and rounding.

A token of K channels is K / W chunks of W channels, W a power of two. A program holds R tokens as two tiles
[R, C, W], of C = FIRST and C = REST chunks, because Triton's tiles are powers of two and few widths are:
1152 = (8 + 1) * 128, 5120 = (4 + 1) * 1024. Triton spreads lanes and warps over the last dimension, then the first.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from functools import cache
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_linear import lacks_fp8
from ..hadamard import matrix_on
from ..quant_token import FLOATS, TINY
from ..transform import Transform
from .gluon_files import GluonFile
from .tiles import fp4_tile, limit_of, rows_contiguous

MAX_K = 16384
"""Longest token kept in registers."""

RESIDENT_WARPS = 16
"""Warps of a multiprocessor that share its work where every program must read H first."""

LANE = 8
"""Channels that a lane holds side by side: 16 bytes of a 2-byte type."""

AMD = torch.version.hip is not None
"""Whether the GPUs of this torch are AMD's."""

GLUON = GluonFile("gluon_producers", "the portable Triton producers run")


@triton.jit
def columns(FROM: tl.constexpr, C: tl.constexpr, W: tl.constexpr, RUN: tl.constexpr):
    """[1, C, W]: numbers of the C chunks from chunk FROM on, said to be contiguous in no more than RUN.

    The widest access sets the layout of all: were int8 signs read by 16, the two tiles would get different ones.
    """
    k = (FROM + tl.arange(0, C))[None, :, None] * W + tl.arange(0, W)[None, None, :]
    return tl.max_contiguous(k, [1, 1, RUN])


@triton.jit
def load_tile(ptr, at, FROM: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, K: tl.constexpr):
    """fp32 [R, C, W] of the rows that start at `at` [R, 1, 1]; channels beyond K are 0.

    A pointer to int32 is one to pairs of bfloat16: unpacked by hand they cost one instruction each, not one and a half.
    """
    EVEN: tl.constexpr = (FROM + C) * W <= K
    if ptr.dtype.element_ty == tl.int32:
        pair = columns(FROM, C, W // 2, 4)
        if EVEN:
            both = tl.load(ptr + at + pair)
        else:
            both = tl.load(ptr + at + pair, mask=pair < K // 2, other=0)
        low = (both << 16).to(tl.float32, bitcast=True)
        high = (both & -65536).to(tl.float32, bitcast=True)
        tile = tl.reshape(tl.join(low, high), (R, C, W))
    else:
        k = columns(FROM, C, W, 8)
        if EVEN:
            tile = tl.load(ptr + at + k)
        else:
            tile = tl.load(ptr + at + k, mask=k < K, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def store_tile(ptr, at, tile, live, FROM: tl.constexpr, C: tl.constexpr, W: tl.constexpr, K: tl.constexpr):
    """Store a tile [R, C, W] of ptr's type for the tokens that are `live` [R]."""
    k = columns(FROM, C, W, 8)
    mask = live[:, None, None]
    if (FROM + C) * W > K:
        mask = mask & (k < K)
    tl.store(ptr + at + k, tile, mask=mask)


@triton.jit
def max_or_nan(a, b):
    """The larger one, nan if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def token_sums(x, y, TWO: tl.constexpr, FLAT: tl.constexpr):
    """[R]: sums over the channels of both tiles; y counts only if TWO. FLAT: chunks are spread over lanes or warps."""
    if FLAT:
        total = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2])), axis=1)
        if TWO:
            total += tl.sum(tl.reshape(y, (y.shape[0], y.shape[1] * y.shape[2])), axis=1)
    else:
        part = tl.sum(x, axis=1)
        if TWO:
            part += tl.sum(y, axis=1)
        total = tl.sum(part, axis=1)
    return total


@triton.jit
def token_maxima(x, y, TWO: tl.constexpr, FLAT: tl.constexpr):
    """[R]: largest magnitudes over the channels of both tiles, nan if there is one; see `token_sums`."""
    if FLAT:
        top = tl.reduce(tl.reshape(tl.abs(x), (x.shape[0], x.shape[1] * x.shape[2])), 1, max_or_nan)
        if TWO:
            flat = tl.reshape(tl.abs(y), (y.shape[0], y.shape[1] * y.shape[2]))
            top = max_or_nan(top, tl.reduce(flat, 1, max_or_nan))
    else:
        part = tl.reduce(tl.abs(x), 1, max_or_nan)
        if TWO:
            part = max_or_nan(part, tl.reduce(tl.abs(y), 1, max_or_nan))
        top = tl.reduce(part, 1, max_or_nan)
    return top


@triton.jit
def transform_tile(
    y, pre_scale_ptr, signs_ptr, zero,
    FROM: tl.constexpr, HAS_PRE_SCALE: tl.constexpr, HAS_SIGNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y * pre_scale * signs; zero: int64 [R, 1, 1] of 0, which gives the vectors the layout of y."""
    if HAS_PRE_SCALE:
        y = y * load_tile(pre_scale_ptr, zero, FROM, y.shape[0], y.shape[1], y.shape[2], K)
    if HAS_SIGNS:
        k = columns(FROM, y.shape[1], y.shape[2], 8)
        if (FROM + y.shape[1]) * y.shape[2] <= K:
            signs = tl.load(signs_ptr + zero + k)
        else:
            signs = tl.load(signs_ptr + zero + k, mask=k < K, other=1)
        y = (y.to(tl.int32, bitcast=True) ^ (signs.to(tl.int32) & -2147483648)).to(tl.float32, bitcast=True)
    return y


@triton.jit
def rotate_tile(y, h, DOT: tl.constexpr, SIZE: tl.constexpr, MIN_ROWS: tl.constexpr):
    """Every run of SIZE channels times h of +-1; also the largest magnitude of each token [R]."""
    ROWS: tl.constexpr = y.numel // SIZE
    blocks = tl.reshape(y, (ROWS, SIZE))
    if ROWS < MIN_ROWS:
        # A product has at least 16 rows: repeat them, and take the larger of equals afterwards.
        COPIES: tl.constexpr = MIN_ROWS // ROWS
        blocks = tl.reshape(tl.broadcast_to(blocks[None, :, :], (COPIES, ROWS, SIZE)), (MIN_ROWS, SIZE))
    if DOT == "bf16x2":
        high = blocks.to(tl.bfloat16)
        z = tl.dot(high, h)
        z = tl.dot((blocks - high.to(tl.float32)).to(tl.bfloat16), h, z)
    elif DOT == "tf32":
        z = tl.dot(blocks, h, input_precision="tf32")
    else:
        z = tl.dot(blocks.to(h.dtype), h, input_precision="ieee")
    if ROWS < MIN_ROWS:
        z = tl.max(tl.reshape(z, (MIN_ROWS // ROWS, ROWS, SIZE)), axis=0)
    top = tl.reshape(tl.reduce(tl.abs(z), 1, max_or_nan), (y.shape[0], ROWS // y.shape[0]))
    return tl.reshape(z, y.shape), tl.reduce(top, 1, max_or_nan)


@triton.jit
def code_bits(t, INT8: tl.constexpr):
    """The code of t as int32, in its low byte; int8 rounds as `tiles.round_to_int8` does."""
    if INT8:
        bits = (t + 12582912.0).to(tl.int32, bitcast=True) & 255
    else:
        t = tl.clamp(t, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        bits = t.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    return bits


@triton.jit
def store_codes(
    pairs_ptr, at, z, inverse, live, FROM: tl.constexpr, K: tl.constexpr, INT8: tl.constexpr
):  # fmt: skip
    """codes = round(z * inverse), two to an int16: neighbours are in one thread, also behind a product."""
    C: tl.constexpr = z.shape[1]
    W: tl.constexpr = z.shape[2]
    low, high = tl.split(tl.reshape(z * inverse[:, None, None], (z.shape[0], C, W // 2, 2)))
    pairs = (code_bits(low, INT8) | (code_bits(high, INT8) << 8)).to(tl.int16)
    pair = columns(FROM, C, W // 2, 4)
    mask = live[:, None, None]
    if (FROM + C) * W > K:
        mask = mask & (pair < K // 2)
    tl.store(pairs_ptr + at + pair, pairs, mask=mask)


@triton.jit
def load_hadamard(h_ptr, SIZE: tl.constexpr):
    """H [SIZE, SIZE]; nothing of use if SIZE is 0."""
    h = 0.0
    if SIZE > 0:
        r = tl.arange(0, SIZE)
        h = tl.load(h_ptr + r[:, None] * SIZE + r[None, :])
    return h


@triton.jit
def quantize_tokens(
    y1, y2, h, pairs_ptr, scale_ptr, row, live,
    INT8: tl.constexpr, FP4: tl.constexpr, TINY: tl.constexpr, DOT: tl.constexpr, SIZE: tl.constexpr,
    MIN_ROWS: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, TWO: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Rotate (SIZE > 0), find one scale per token, round and store both tiles. FP4: None, or a group."""
    LIMIT: tl.constexpr = limit_of(INT8, FP4)
    unit = tl.full(row.shape, 1.0, tl.float32)
    if SIZE > 0:
        unit *= SIZE**-0.5
        if DOT == "fp16":
            # Powers of two that bring each token's largest magnitude to [1, 2): exact, and nothing overflows.
            bits = token_maxima(y1, y2, TWO, FLAT).to(tl.int32, bitcast=True) & 0x7F800000
            down = (0x7F000000 - bits).to(tl.float32, bitcast=True)
            unit *= bits.to(tl.float32, bitcast=True)
            y1 = y1 * down[:, None, None]
            if TWO:
                y2 = y2 * down[:, None, None]
        y1, top = rotate_tile(y1, h, DOT, SIZE, MIN_ROWS)
        if TWO:
            y2, top2 = rotate_tile(y2, h, DOT, SIZE, MIN_ROWS)
            top = max_or_nan(top, top2)
    else:
        top = token_maxima(y1, y2, TWO, FLAT)
    amax = max_or_nan(top * unit, tl.full(row.shape, TINY, tl.float32))
    scale = tl.div_rn(amax, LIMIT)
    inverse = tl.div_rn(tl.full(row.shape, LIMIT, tl.float32), amax) * unit
    if FP4 is not None:
        t1, t2 = y1 * inverse[:, None, None], y2 * inverse[:, None, None]
        y1 = fp4_tile(t1, FP4)
        if TWO:
            y2 = fp4_tile(t2, FP4)
        along = token_sums(t1 * y1, t2 * y2, TWO, FLAT)
        scale *= tl.where(along > 0, token_sums(t1 * t1, t2 * t2, TWO, FLAT) / along, 1.0)
        inverse = tl.full(row.shape, 1.0, tl.float32)
    tl.store(scale_ptr + row, scale, mask=live)
    at = (row.to(tl.int64) * (K // 2))[:, None, None]
    store_codes(pairs_ptr, at, y1, inverse, live, 0, K, INT8)
    if TWO:
        store_codes(pairs_ptr, at, y2, inverse, live, FIRST, K, INT8)


def limits(
    op: str, dtype: torch.dtype | None = None, k: int | None = None, block_size: int | None = None, **_: Any
) -> str | None:
    """Why a producer cannot take such an input; None when it can."""
    if dtype is not None and dtype not in FLOATS:
        return f"dtype {dtype} is not supported"
    if k is not None and (k > MAX_K or k % 16):
        return f"K={k} is larger than {MAX_K}" if k > MAX_K else f"K={k} is not a multiple of 16"
    if block_size and not 16 <= block_size <= 128:
        return f"block_size {block_size} is outside 16 to 128"
    return None


def unsupported(op: str, x: Tensor, k: int, transform: Transform) -> str | None:
    """`limits` of these operands, and what this GPU lacks."""
    reason = None if transform.code_dtype == torch.int8 else lacks_fp8(x.device)
    return reason or limits(op, dtype=x.dtype, k=k, block_size=transform.block_size)


def _power_of_two(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


@cache
def launch_options(k: int, block_size: int, group: int = 0, amd: bool = AMD) -> dict[str, Any]:
    """Tokens, chunk width (at least a group) and warps of a program, and the type of the rotation's operands.

    None of it may depend on M: the order of the sums, and so a token's codes, follow from it.
    """
    chunk = _power_of_two(k)
    if block_size == 0:
        r = 2 if k <= 1536 else 1
        warps = max(1, triton.next_power_of_2(triton.cdiv(k * r, 32 * 80)))
    else:
        r, first = 1, 1 << (k.bit_length() - 1)
        # Hopper multiplies 64 rows at a time; and tokens enough for every lane keep most sums inside threads.
        while r * first < 64 * block_size or r * k < 4096:
            r *= 2
        spread = max(1, 32 * LANE * 4 // chunk)
        if spread * k <= 128 * 80:
            r = max(r, spread)
        elif chunk < 128:
            r = 1  # chunks spread thin take many registers
        warps = 4 if r * k <= 128 * 80 else 8
        if amd:  # every warp holds H beside its tokens, and has twice the lanes: with more of either it spills
            r, warps = min(r, 4), 4
    width = min(chunk, max(block_size, group, 32 * LANE * warps // r, 16))
    return {"R": r, "W": width, "num_warps": warps, "DOT": "fp16", "MIN_ROWS": 16, "num_stages": 1}


def chunks(k: int, width: int) -> tuple[int, int]:
    """Chunks of the two tiles: the largest power of two, and what holds the rest (0 if nothing is left)."""
    first = 1 << ((k // width).bit_length() - 1)
    rest = k // width - first
    return first, triton.next_power_of_2(rest) if rest else 0


DOT_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "bf16x2": torch.bfloat16, "tf32": torch.float32}


def tile_options(k: int, transform: Transform, amd: bool = AMD) -> dict[str, Any]:
    """Every constexpr that a producer takes for its tiles and its transform, and the launch options."""
    options = launch_options(k, transform.block_size, transform.fp4_group or 0, amd)
    first, rest = chunks(k, options["W"])
    flat = options["R"] * options["W"] < 32 * LANE * options["num_warps"]
    return options | {
        "K": k,
        "FIRST": first,
        "REST": rest,
        "FLAT": flat,
        "SIZE": transform.block_size,
        "HAS_PRE_SCALE": transform.pre_scale is not None,
        "HAS_SIGNS": transform.signs is not None,
        "INT8": transform.code_dtype == torch.int8,
        "FP4": transform.fp4_group,
        "TINY": TINY,
    }


def programs(tokens: int, options: dict[str, Any], device: torch.device) -> tuple[int]:
    """Grid: one program per tile, or, where each must read H first, as many as are resident."""
    tiles = triton.cdiv(tokens, options["R"])
    if options["SIZE"] == 0:
        return (tiles,)
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return (min(tiles, units * RESIDENT_WARPS // options["num_warps"]),)


@cache
def _hadamard(block_size: int, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return matrix_on(block_size, kind, torch.empty((), dtype=dtype, device=device))


def hadamard_operand(transform: Transform, options: dict[str, Any], like: Tensor) -> Tensor:
    """H in the type of the product; some tensor where there is none."""
    if transform.block_size == 0:
        return like
    return _hadamard(transform.block_size, transform.hadamard_kind, DOT_TYPES[options["DOT"]], like.device)


def readable(rows: Tensor) -> Tensor:
    """The rows as a kernel reads them: contiguous in the last dimension, bfloat16 as int32 pairs; copied if need be."""
    if rows.stride(-1) != 1:
        rows = rows_contiguous(rows)
    if rows.dtype != torch.bfloat16:
        return rows
    if rows.storage_offset() % 2 or (rows.dim() > 1 and rows.stride(0) % 2) or rows.data_ptr() % 4:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.int32)


def aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it that access 16 bytes at a time, however many rows there are; copied if need be."""
    stride = tensor.stride(0) if tensor.dim() > 1 and tensor.shape[0] > 1 else 0
    if tensor.stride(-1) != 1 or stride % 16 or stride >= 1 << 31 or tensor.data_ptr() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def row_stride(rows: Tensor) -> int:
    """Elements from one row to the next: torch leaves it open for a single one."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def note(op: str, device: torch.device, **_: Any) -> str | None:
    """For `dispatch.explain`: why the Gluon kernels are left out on a GPU that they are made for."""
    return GLUON.note(device)


def gluon_for(x: Tensor, k: int, prefix: int, transform: Transform) -> ModuleType | None:
    """The Gluon kernels, if they take tokens of k channels on this device."""
    found = GLUON.on(x.device)
    block = max(transform.block_size, transform.fp4_group or 0)
    return None if found is None or found.limits(k, prefix, block) is not None else found
