"""Triton twin of `quant_token_block_fp4`: one program per token; the row stays in registers from maxima to rounding."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_scales import MX, TINY
from .quant_token import launch_options, limits, supports
from .tiles import ROUND_EACH_STEP, await_inputs, overlap, round_to_e2m1, rows_contiguous

__all__ = ["limits", "run", "supports"]


@triton.jit
def halves_of(t):
    """The elements nearest to t / 2, times 2, for any t."""
    return round_to_e2m1(tl.minimum(tl.maximum(t, -12.0), 12.0))


@triton.jit
def e8m0_halves(x, bits):
    """fp32 [G, g] and bits [G] from 0 to 254 -> elements times 2, and the size of a half."""
    # Exact: a power of two and its inverse. Scales below the smallest normal number round as that does.
    inverse = ((255 - tl.maximum(bits, 1)) << 23).to(tl.float32, bitcast=True)[:, None]
    half = tl.where(bits > 1, (bits - 1) << 23, tl.where(bits > 0, 1 << 22, 1 << 21))
    return halves_of(x * inverse), half.to(tl.float32, bitcast=True)[:, None]


@triton.jit
def squares(error):
    """fp64 [G]: in fp32 the order of the sum would decide."""
    wide = error.to(tl.float64)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def e4m3_bits(value):
    """fp32 from 0 to 448 -> the bits of the nearest E4M3 number, ties to even, as int32: without a cast, which GPUs
    before fp8 do not have."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 they are multiples of 2**-9: added to such, 1.5 * 2**23 leaves no room for a fraction.
    small = (value * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 15
    return tl.where(value < 0.015625, small, normal)


@triton.jit
def e4m3_value(bits):
    """Bits of E4M3, not negative, as int32 -> fp32."""
    return (bits << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def codes_of(halves, negative):
    """Elements times 2 -> codes of E2M1, int32; a code is the exponent and the first bit of the mantissa."""
    size = tl.abs(halves)
    place = tl.where(size < 2.0, size.to(tl.int32), (size.to(tl.int32, bitcast=True) >> 22) - 254)
    return place + tl.where(negative, 8, 0)


@triton.jit
def quant_token_block_fp4_kernel(
    x_ptr, codes_ptr, block_ptr, scale_ptr, K, TINY: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One token per program; BLOCK >= K; GROUP 32: E8M0 block scales, 16: E4M3."""
    await_inputs()
    at = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * K + k, mask=k < K, other=0.0).to(tl.float32)
    x = tl.reshape(x, (BLOCK // GROUP, GROUP))
    # tl.max drops nan: as inf it makes the scale, and so every output of this token, not finite.
    reach = tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1)
    amax = tl.max(reach, axis=0)
    if GROUP == 32:
        row = 1.0
        exponent = reach.to(tl.int32, bitcast=True) >> 23
        small = tl.maximum(exponent - 2, 0)
        large = tl.maximum(exponent - 1, 0)
        halves, half = e8m0_halves(x, small)
        halves2, half2 = e8m0_halves(x, large)
        take = squares(halves2 * half2 - x) < squares(halves * half - x)
        bits = tl.where(take, large, small)
        halves = tl.where(take[:, None], halves2, halves)
        half = tl.where(take[:, None], half2, half)
    else:
        row = tl.maximum(tl.div_rn(amax, 2688.0), TINY)
        bits = e4m3_bits(tl.minimum(tl.div_rn(tl.div_rn(reach, 6.0), row), 448.0))
        size = (e4m3_value(bits) * row)[:, None]
        halves = halves_of(tl.div_rn(x, tl.maximum(size, TINY)) * 2.0)
        half = size * 0.5
    low, high = tl.split(tl.reshape(codes_of(halves, x < 0), (BLOCK // 2, 2)))
    byte = tl.arange(0, BLOCK // 2)
    tl.store(codes_ptr + at * (K // 2) + byte, (low | (high << 4)).to(tl.uint8), mask=byte < K // 2)
    group = tl.arange(0, BLOCK // GROUP)
    tl.store(block_ptr + at * (K // GROUP) + group, bits.to(tl.uint8), mask=group < K // GROUP)
    inverse = tl.div_rn(1.0, tl.maximum(amax, TINY))
    t = x * inverse
    along = tl.sum(tl.sum(t * (halves * half * inverse), axis=1), axis=0)
    gain = tl.where(along > 0, tl.sum(tl.sum(t * t, axis=1), axis=0) / along, 1.0)
    tl.store(scale_ptr + at, tl.where(amax < float("inf"), row * gain, float("nan")))


def run(op: str, x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """`quant_token_block_fp4` by Triton."""
    m, k = x.shape
    codes = torch.empty((m, k // 2), dtype=torch.uint8, device=x.device)
    block_scale = torch.empty((m, k // group), dtype=torch.uint8, device=x.device)
    scale = torch.empty((m,), dtype=torch.float32, device=x.device)
    if m:
        quant_token_block_fp4_kernel[(m,)](
            rows_contiguous(x), codes, block_scale, scale, k, TINY=TINY, GROUP=group,
            **launch_options(k, least=MX), **ROUND_EACH_STEP, **overlap(x.device),
        )  # fmt: skip
    return codes, block_scale, scale
