"""int8 activations x int4 weights decoded on their way to the tensor core: `int4_linear` for fewer tokens than an
unpacked copy of the weight would pay for.

The product is done transposed, W @ X^T, so that the decoded weight is the operand that tensor cores take from registers
and never goes back to shared memory. It reads weights in blocks of 128 channels (`pack.block_int4`): byte j holds
channels j and j + 64, so that both nibbles of a byte meet activations that are contiguous.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from .tiles import INTERPRETED, store_scaled, tile_ids

BLOCK = tl.constexpr(128)
HALF = tl.constexpr(64)
PTX = not INTERPRETED and torch.version.hip is None
"""Whether nibbles are split by inline PTX, on four bytes at a time. The compiler otherwise works byte by byte."""

# $0, $1: four int8 values of the low and of the high nibbles. $2: four bytes.
SPLIT = tl.constexpr("""{
.reg .b32 t, n, s;
and.b32 n, $2, 0x0F0F0F0F;
and.b32 s, $2, 0x08080808;
mad.lo.u32 $0, s, 0x1E, n;
shr.u32 t, $2, 4;
and.b32 n, t, 0x0F0F0F0F;
and.b32 s, t, 0x08080808;
mad.lo.u32 $1, s, 0x1E, n;
}""")

# As `scale_lanes` of int4_decode.py: two codes, each in a 16-bit lane, by one multiplication. $3, $7: the group scale
# of the low and of the high nibbles; $11, $15: what each adds.
SCALE = tl.constexpr("""{
.reg .b32 t, a, b, s;
shl.b32 s, $3, 4;
shr.u32 t, $2, 8;
lop3.b32 a, $2, 0x000F000F, 0x00080008, 0x6A;
lop3.b32 b, t, 0x000F000F, 0x00080008, 0x6A;
mad.lo.u32 a, a, s, $11;
mad.lo.u32 b, b, s, $11;
prmt.b32 $0, a, b, 0x7351;
lop3.b32 a, $2, 0x00F000F0, 0x00800080, 0x6A;
lop3.b32 b, t, 0x00F000F0, 0x00800080, 0x6A;
mad.lo.u32 a, a, $7, $15;
mad.lo.u32 b, b, $7, $15;
prmt.b32 $1, a, b, 0x7351;
}""")


@triton.jit
def split_bytes(packed, low_scale, high_scale, GROUPED: tl.constexpr, PTX: tl.constexpr):
    """int8 [R, B] -> the int8 values of the low and of the high nibbles; scales: int32 [R], read when GROUPED."""
    if not PTX:
        low = (packed << 4) >> 4
        high = packed >> 4
        if GROUPED:
            low = ((low.to(tl.int32) * low_scale[:, None] + 8) >> 4).to(tl.int8)
            high = ((high.to(tl.int32) * high_scale[:, None] + 8) >> 4).to(tl.int8)
    elif GROUPED:
        low_offset = (8 - 8 * low_scale) * 0x00100010 + 0x00080008
        high_offset = (8 - 8 * high_scale) * 0x00100010 + 0x00080008
        low, high = tl.inline_asm_elementwise(
            SCALE, "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [packed, low_scale[:, None], high_scale[:, None], low_offset[:, None], high_offset[:, None]],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = tl.inline_asm_elementwise(
            SPLIT, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return low, high


@triton.jit(do_not_specialize=["M"])
def int4_fused_kernel(
    x_ptr, w_ptr, scale_ptr, weight_scale_ptr, group_ptr, bias_ptr, y_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile per program; K is a multiple of 128; GROUP is 0 (none), 64 or 128."""
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    # Rows beyond the edge repeat the last one: their results are never stored, and the loads need no row mask.
    rm = tl.minimum(pid_m * BM + tl.arange(0, BM), M - 1).to(tl.int64)
    rn = tl.minimum(pid_n * BN + tl.arange(0, BN), N - 1).to(tl.int64)
    rb = tl.arange(0, HALF)
    x_at = x_ptr + rm[None, :] * K + rb[:, None]
    w_at = w_ptr + rn[:, None] * tl.multiple_of(K // 2, HALF) + rb[None, :]
    gn = pid_n * BN + tl.arange(0, BN)
    g_at = group_ptr + gn
    acc = tl.zeros((BN, BM), dtype=tl.int32)
    for _ in range(0, K, BLOCK):
        packed = tl.load(w_at)
        low_x = tl.load(x_at)
        high_x = tl.load(x_at + HALF)
        low_scale, high_scale = gn, gn
        if GROUP > 0:
            scales = tl.load(g_at, mask=gn < N, other=0)
            low_scale, high_scale = scales & 0xFF, scales >> 16
        low, high = split_bytes(packed, low_scale, high_scale, GROUP > 0, PTX)
        acc = tl.dot(low, low_x, acc, out_dtype=tl.int32)
        acc = tl.dot(high, high_x, acc, out_dtype=tl.int32)
        x_at += BLOCK
        w_at += HALF
        g_at += N
    store_scaled(
        y_ptr, acc.T, scale_ptr, weight_scale_ptr, bias_ptr, pid_m, pid_n, M, N,
        HAS_SCALE=True, HAS_BIAS=HAS_BIAS, BM=BM, BN=BN,
    )  # fmt: skip
