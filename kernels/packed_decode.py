"""Decoding of 2-, 3- and 6-bit weights to int8, for the products of `int8_linear.py`.

Every layout decodes exactly to int8 with one fp32 scale per row.
"""

import torch
from torch import Tensor

from . import dispatch
from .int4_linear import check_groups
from .int8_linear import unfit
from .op import define_op
from .pack import WIDTHS, unpack_bits

OP = "packed_to_int8"


def _check(weight: Tensor, group_scale: Tensor | None, k: int, bits: int) -> None:
    if bits not in WIDTHS:
        raise unfit(OP, "2, 3 or 6 bits", bits)
    width = (k + 7) // 8 * bits
    ok = weight.dtype == torch.uint8 and weight.dim() == 2 and weight.shape[1] == width and k > 0
    if not ok:
        raise unfit(OP, f"packed weight torch.uint8 [N, {width}] for K={k} of {bits} bits", weight)
    check_groups(OP, weight.shape[0], k, group_scale)


def _reference(weight: Tensor, group_scale: Tensor | None, k: int, bits: int, odd: bool) -> Tensor:
    _check(weight, group_scale, k, bits)
    code = unpack_bits(weight, k, bits)
    if odd:
        code.mul_(2).add_(1)
    if group_scale is None:
        return code
    n, columns = group_scale.shape
    shift = bits + odd
    wide = code.view(n, columns, k // columns).to(torch.int16).mul_(group_scale.to(torch.int16).unsqueeze(2))
    return wide.add_(1 << (shift - 1)).bitwise_right_shift_(shift).to(torch.int8).view(n, k)


@define_op("packed_to_int8")
def packed_to_int8(weight: Tensor, group_scale: Tensor | None, k: int, bits: int, odd: bool) -> Tensor:
    """v[n, k] = c[n, k] without group_scale, else (c[n, k] * group_scale[n, k // g] + 2^(f-1)) >> f (arithmetic shift),
    where c = q, f = bits, or on an odd grid c = 2q + 1, f = bits + 1.

    weight: uint8 [N, bits * ceil(K/8)], the codes q as `pack_bits` packs them
    group_scale: uint8 [N, K/g] with f fractional bits and g in 16, 32, 64, 128; or None
    bits: 2, 3 or 6
    returns: int8 [N, K], within [-127, 127]
    Raises ValueError when a shape or dtype does not fit, or group_scale's columns do not cut K into such groups.
    """
    return _reference(weight, group_scale, k, bits, odd)


@packed_to_int8.register_fake
def _(weight: Tensor, group_scale: Tensor | None, k: int, bits: int, odd: bool) -> Tensor:
    _check(weight, group_scale, k, bits)
    return weight.new_empty((weight.shape[0], k), dtype=torch.int8)


@packed_to_int8.register_cuda
def _(weight: Tensor, group_scale: Tensor | None, k: int, bits: int, odd: bool) -> Tensor:
    _check(weight, group_scale, k, bits)
    return dispatch.run(OP, _reference, weight, group_scale, k, bits, odd)
