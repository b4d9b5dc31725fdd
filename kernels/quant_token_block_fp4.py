"""Dynamic quantisation of activations to block-scaled FP4: the operand of `block_fp4_linear`, MXFP4 or NVFP4.

As weights of these formats are rounded (`quantize/block_float.py`), and the token's scale takes out what rounding does
to its length (`quant_token_fp4.py`).
"""

import torch
from torch import Tensor

from . import dispatch
from .block_scales import E4M3_LARGEST, MX, NV, TINY, block_halves, block_scale, e4m3_bits, e8m0_bits
from .int8_linear import check_float, unfit
from .op import define_op

OP = "quant_token_block_fp4"
ROW_LARGEST = 6 * E4M3_LARGEST
"""What NVFP4's largest element and block scale make of a row's scale."""


def _check(x: Tensor, group: int) -> None:
    check_float(OP, x)
    k = x.shape[1]
    if group not in (MX, NV):
        raise unfit(OP, f"blocks of {NV} or {MX}", group)
    if k <= 0 or k % group != 0:
        raise unfit(OP, f"K > 0 to be a multiple of the block {group}", f"K={k}")


def _nearer_e8m0(blocks: Tensor, reach: Tensor) -> Tensor:
    """The standard's scale of each block, or twice that where it is nearer. uint8 [M, G]."""
    bits = [e8m0_bits(reach, above) for above in (0, 1)]
    errors = []
    for found in bits:
        size = block_scale(found, MX)[..., None]
        # In float64 the order of a sum does not decide.
        errors.append((block_halves(blocks, size) * (size / 2) - blocks).double().square().sum(2))
    return torch.where(errors[1] < errors[0], bits[1], bits[0])


def _reference(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, group)
    m, k = x.shape
    blocks = x.float().reshape(m, k // group, group)
    reach = blocks.abs().amax(2)
    amax = reach.amax(1)
    if group == MX:
        row, bits = torch.ones_like(amax), _nearer_e8m0(blocks, reach)
    else:
        # As tensors: dividing by a Python number is a multiplication with a rounded reciprocal on some devices.
        row = (amax / torch.full_like(amax, ROW_LARGEST)).clamp_min(TINY)
        bits = e4m3_bits(reach / torch.full_like(reach, 6) / row[:, None])
    size = (block_scale(bits, group) * row[:, None])[..., None]
    halves = block_halves(blocks, size)
    scale = torch.where(amax.isfinite(), row * _gain(blocks, halves * (size / 2), amax), torch.nan)
    return _pack(halves, blocks < 0).view(m, k // 2), bits, scale


def _gain(blocks: Tensor, rounded: Tensor, amax: Tensor) -> Tensor:
    """float32 [M]: |x|^2 / <x, rounded>, 1 for a row of zeros. Relative to the row, so that no square overflows."""
    inverse = (torch.ones_like(amax) / amax.clamp_min(TINY))[:, None, None]
    t = blocks * inverse
    along = (t * (rounded * inverse)).sum((1, 2))
    return torch.where(along > 0, t.square().sum((1, 2)) / along, 1.0)


def _pack(halves: Tensor, negative: Tensor) -> Tensor:
    """uint8 [..., g / 2]: codes of E2M1, two a byte, of elements times 2."""
    size = halves.abs().to(torch.int32)
    place = size - (size > 4).int() - (size > 6).int() - 3 * (size > 8).int()
    code = place + 8 * negative.int()
    return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)


@define_op("quant_token_block_fp4")
def quant_token_block_fp4(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """x[m, k] ~ e(codes[m, k]) * b[m, k // group] * scale[m], e in +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, E2M1:

    group 32: b = 2^j, j = floor(log2 max_block |x|) - 2, or j + 1 where the block's squared error is less;  r = 1
    group 16: b = E4M3(max_block |x| / 6 / r),  r[m] = max_k |x[m, k]| / (6 * 448)
    e = E2M1(x / (b r)),  scale = r * sum_k x^2 / sum_k x (e b r), so that sum_k x (e b scale) = sum_k x^2.

    E2M1 and E4M3 round to nearest, ties to the even code, and saturate.

    x: fp32 | bf16 | fp16 [M, K], row-major; group: 32 (MXFP4) or 16 (NVFP4), which divides K
    returns codes: uint8 [M, K/2], even k in the low nibble; bit 3 of a code is the sign
    returns block_scale: uint8 [M, K/group], bits of E8M0 or E4M3
    returns scale: fp32 [M]; positive and finite for finite x, not finite for a row that holds inf or nan
    Raises ValueError for another dtype, rank or group.
    """
    return _reference(x, group)


@quant_token_block_fp4.register_fake
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, group)
    m, k = x.shape
    codes, bits = (x.new_empty((m, width), dtype=torch.uint8) for width in (k // 2, k // group))
    return codes, bits, x.new_empty((m,), dtype=torch.float32)


@quant_token_block_fp4.register_cuda
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, group)
    return dispatch.run(OP, _reference, x, group)
