"""Dynamic quantisation of activations to FP4 (E2M1) in a form that int8 tensor cores multiply exactly.

E2M1 values times 2 are the integers 0, 1, 2, 3, 4, 6, 8, 12. With one scale per token those are the codes themselves.
With a block scale of 8 bits relative to the token's, the codes are the int8 levels that both stand for together.

The cells of a float grid grow outwards while the density of the data falls, so rounding to the nearest makes a token
longer on average. That is an error of one direction at every step of a sampler, and sums up. The scale takes it out:
the quantised token's projection on the token is the token itself.
"""

import torch
from torch import Tensor

from . import dispatch
from .int4_linear import check_rows
from .op import define_op
from .quant_token import TINY

OP = "quant_token_fp4"
LARGEST = 12.0
"""E2M1's largest value, in halves."""
BLOCK_LARGEST, BLOCK_ONE = 169, 16
"""Largest block scale, and 1.0 as a block scale: 12 * 169 / 16 is just below 127."""
ROW_LARGEST = LARGEST * BLOCK_LARGEST / BLOCK_ONE
"""The level of a token's largest element when there are block scales: 126.75."""


def round_to_e2m1(t: Tensor) -> Tensor:
    """Nearest of 0, 1, 2, 3, 4, 6, 8, 12 with t's sign, ties to the even code; |t| above 12 saturates.

    t: float32, in halves of E2M1's values; returns float32 of the same shape
    """
    size = t.abs().clamp(max=LARGEST)
    step = torch.where(size < 4, 1.0, torch.where(size < 8, 2.0, 4.0))
    return torch.copysign((size / step).round() * step, t)


def round_rows_fp4(wide: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of fp32 rows [M, K]: the unchecked body, shared with fused ops."""
    m, k = wide.shape
    amax = wide.abs().amax(dim=1).clamp_min_(TINY)
    # As tensors: dividing by or into a Python number is a multiplication with a rounded reciprocal on some devices.
    limit = torch.full_like(amax, ROW_LARGEST if group else LARGEST)
    scaled = wide * (limit / amax).unsqueeze(1)
    if not group:
        codes = round_to_e2m1(scaled)
        return codes.to(torch.int8), amax / limit * _gain(scaled, codes)
    blocks = scaled.view(m, k // group, group)
    block = (blocks.abs().amax(2, keepdim=True) * (BLOCK_ONE / LARGEST)).ceil().clamp(1, BLOCK_LARGEST)
    code = round_to_e2m1(blocks * (torch.full_like(block, BLOCK_ONE) / block))
    level = (code.to(torch.int32) * block.to(torch.int32) + BLOCK_ONE // 2) >> 4
    level = level.to(torch.int8).view(m, k)
    return level, amax / limit * _gain(scaled, level.float())


def _reference(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    check_rows(OP, x, group)
    return round_rows_fp4(x.float(), group)


def _gain(scaled: Tensor, codes: Tensor) -> Tensor:
    """float32 [M]: |x|^2 / <x, codes>, 1 for a row of zeros."""
    along = (scaled * codes).sum(1)
    return torch.where(along > 0, scaled.square().sum(1) / along, 1.0)


@define_op("quant_token_fp4")
def quant_token_fp4(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x[m, k] ~ codes[m, k] * scale[m], codes made of E2M1 elements e in +-{0, 1, 2, 3, 4, 6, 8, 12}, in halves:

    group 0: codes = e = E2M1(t),  t = x * (12 / amax),  amax[m] = max_k |x[m, k]|
    else:    codes = (e * b + 8) >> 4,  e = E2M1(t * (16 / b)),  t = x * (126.75 / amax),
             b[m, k // group] = ceil(16/12 max_group |t|) in 1..169

    scale[m] = amax / (12 or 126.75) * sum_k t^2 / sum_k t codes, so that sum_k x (codes scale) = sum_k x^2.
    E2M1 rounds to nearest, ties to the even code.

    x: fp32 | bf16 | fp16 [M, K], row-major; group: 0, or 16, 32, 64 or 128, which divides K
    returns codes: int8 [M, K], within [-127, 127]
    returns scale: fp32 [M]; positive and finite for finite x, not finite for a row that holds inf or nan
    Raises ValueError for another dtype, rank or group.
    """
    return _reference(x, group)


@quant_token_fp4.register_fake
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    check_rows(OP, x, group)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0],), dtype=torch.float32)


@quant_token_fp4.register_cuda
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    check_rows(OP, x, group)
    return dispatch.run(OP, _reference, x, group)
