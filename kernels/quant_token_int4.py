"""Dynamic quantisation of activations to int4 in a form that int8 tensor cores multiply exactly.

With one scale per token the codes are the int4 codes themselves. With a group scale of 8 bits relative to the token's,
they are the int8 levels that both stand for together, as `int4_to_int8` decodes them for a weight.

Rounding moves a token's length, an error of one direction at every step of a sampler. The scale takes it out: the
quantised token's projection on the token is the token itself.
"""

import torch
from torch import Tensor

from . import dispatch
from .int4_linear import check_rows
from .op import define_op

OP = "quant_token_int4"
LOW, HIGH = -8, 7
GROUP_LARGEST, GROUP_ONE = 255, 16
"""Largest group scale, and 1.0 as a group scale: -8 * 255 / 16 is just above -127.5, and rounds to -127."""
TINY = torch.finfo(torch.float32).tiny
"""Smallest step: an all-zero group then gives zero codes."""


def _reference(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    check_rows(OP, x, group)
    m, k = x.shape
    groups = x.float().reshape(m, k // (group or k), group or k)
    top, bottom = groups.amax(2), groups.amin(2)
    # By a tensor: dividing by a Python number is a multiplication with a rounded reciprocal on some devices.
    step = torch.maximum(top / torch.full_like(top, HIGH), bottom / torch.full_like(bottom, LOW)).clamp_min_(TINY)
    row = step.amax(1)
    if group:
        row = (row / torch.full_like(row, GROUP_LARGEST / GROUP_ONE)).clamp_min_(TINY)
    t = groups / row[:, None, None]
    if group:
        level = _nearest_level(t, (step / row[:, None] * GROUP_ONE).round_().clamp_(1, GROUP_LARGEST)[:, :, None])
    else:
        level = t.round().clamp_(LOW, HIGH)
    # Of t rather than x: the squares of a finite x may not be.
    along = (t * level).sum((1, 2))
    gain = torch.where(along > 0, t.square().sum((1, 2)) / along, 1.0)
    return level.to(torch.int8).view(m, k), row * gain


def _nearest_level(t: Tensor, scale: Tensor) -> Tensor:
    """float32 [M, groups, group] in steps of the token, and group scales [M, groups, 1] -> the nearest levels."""
    code = (t * GROUP_ONE / scale).round_().clamp_(LOW, HIGH)
    best = _level(code, scale)
    error = (best - t).abs_()
    # Levels are rounded to integers, so a neighbour's may be nearer than the rounded code's.
    for offset in (-1, 1):
        level = _level((code + offset).clamp_(LOW, HIGH), scale)
        distance = (level - t).abs_()
        closer = distance < error
        best, error = torch.where(closer, level, best), torch.where(closer, distance, error)
    return best


def _level(code: Tensor, scale: Tensor) -> Tensor:
    """(code * scale + 8) >> 4 in float32, where it is exact."""
    return torch.floor((code * scale + GROUP_ONE // 2) / GROUP_ONE)


@define_op("quant_token_int4")
def quant_token_int4(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x[m, k] ~ codes[m, k] * scale[m], codes made of int4 elements c in [-8, 7]:

    step[m, g] = max(max_group x / 7, -min_group x / 8, 2^-126)
    group 0:   row = step;  codes = c = clamp(round(t), -8, 7),  t = x / row
    else:      row[m] = max(max_g step / (255/16), 2^-126);  codes = (c * r + 8) >> 4,  t = x / row,
               r[m, g] = clamp(round(step / row * 16), 1, 255),
               c: of clamp(round(t * 16 / r), -8, 7) and its two neighbours, held to [-8, 7] too, the one whose codes
               are nearest to t; equally near, the rounded one before c - 1 before c + 1

    scale[m] = row * sum_k t^2 / sum_k t codes, so that sum_k x (codes scale) = sum_k x^2; row where that sum is 0.
    All rounding is to nearest, ties to even.

    x: fp32 | bf16 | fp16 [M, K], row-major; group: 0 (one scale per token), or 16, 32, 64 or 128, which divides K
    returns codes: int8 [M, K], within [-127, 127]
    returns scale: fp32 [M]; positive and finite for finite x, not finite for a row that holds inf or nan
    Raises ValueError for another dtype, rank or group.
    """
    return _reference(x, group)


@quant_token_int4.register_fake
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    check_rows(OP, x, group)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0],), dtype=torch.float32)


@quant_token_int4.register_cuda
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    check_rows(OP, x, group)
    return dispatch.run(OP, _reference, x, group)
