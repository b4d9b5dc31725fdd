"""The scales of blocks of FP4 elements: their bits, and what elements and bits stand for together.

    x[k] = e[k] * block[k // g],  e one of +-{0, 0.5, 1, 1.5, 2, 3, 4, 6} (E2M1)

g = 32 (MXFP4): block = 2^(bits - 127), E8M0 (OCP Microscaling 1.0, 2023)
g = 16 (NVFP4): block in E4M3, not negative, relative to an fp32 scale of the row

e has two bits of mantissa and a block scale four at most, so that bfloat16 holds every x exactly.
"""

from functools import cache

import torch
from torch import Tensor

from .quant_token_fp4 import round_to_e2m1

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_LARGEST = 448.0
MX, NV = 32, 16
"""Elements of a block with an E8M0 scale, and of one with an E4M3 scale."""
TINY = torch.finfo(torch.float32).tiny
_BIAS = 127


def e8m0_scale(bits: Tensor) -> Tensor:
    """uint8 bits of E8M0 -> float32: 2^(bits - 127); 255 is NaN."""
    exponent = bits.to(torch.int32)  # that of float32 as it is; 2^-127 has none
    size = torch.where(exponent > 0, exponent << 23, 1 << 22).view(torch.float32)
    return torch.where(exponent < 255, size, torch.nan)


def e8m0_bits(reach: Tensor, above: int = 0) -> Tensor:
    """uint8: the shared exponent of blocks with the given largest magnitudes, for elements up to 2^2 (1.x); `above`:
    so many powers of two more."""
    exponent = torch.frexp(reach).exponent.to(torch.int32) - 1 + above  # floor(log2), exact
    return torch.where(reach > 0, (exponent - 2 + _BIAS).clamp(0, 254), 0).to(torch.uint8)


def e4m3_scale(bits: Tensor) -> Tensor:
    """uint8 bits of E4M3 -> float32."""
    return bits.view(torch.float8_e4m3fn).float()


def e4m3_bits(value: Tensor) -> Tensor:
    """uint8 bits of the nearest E4M3 number, saturating, ties to even. value: float32, not negative."""
    return value.clamp(max=E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def block_scale(bits: Tensor, group: int) -> Tensor:
    """float32: what the bits of scales of blocks of `group` stand for."""
    return e8m0_scale(bits) if group == MX else e4m3_scale(bits)


def block_halves(blocks: Tensor, size: Tensor) -> Tensor:
    """The elements nearest to blocks / size, times 2. blocks: float32 [..., g]; size: float32 [..., 1]."""
    return round_to_e2m1(blocks / size.clamp_min(TINY) * 2)


def decode_blocks(packed: Tensor, bits: Tensor) -> Tensor:
    """float32 [R, K]: elements times their block's scale.

    packed: uint8 [R, K/2] of two E2M1 codes, even k in the low nibble, the sign in bit 3; bits: uint8 [R, K/g]
    """
    (rows, columns), k = bits.shape, 2 * packed.shape[1]
    group = k // columns
    elements = _pairs(packed.device)[packed.int()].reshape(rows, columns, group)
    return (elements * block_scale(bits, group)[..., None]).view(rows, k)


@cache
def _pairs(device: torch.device) -> Tensor:
    """float32 [256, 2]: the elements of every byte."""
    with torch.inference_mode(False):  # the cached table must serve every later caller
        codes = torch.tensor([*E2M1, *(-value for value in E2M1)], device=device)
        byte = torch.arange(256, device=device)
        return torch.stack((codes[byte & 15], codes[byte >> 4]), 1)
