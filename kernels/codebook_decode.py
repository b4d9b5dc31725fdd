"""Decoding of weights that index a table of int8 values, for the products of `int8_linear.py`.

One op serves minifloats of four bits (a table for each element type, one value an entry), ternary weights, and vector
quantisation (one table, several values an entry). Every layout decodes exactly to int8 with one fp32 scale per row.
"""

import torch
from torch import Tensor

from . import dispatch
from .int4_linear import check_groups
from .int8_linear import unfit
from .op import define_op
from .pack import code_bytes, unpack_codes

OP = "codebook_to_int8"
BITS = {4: 2, 16: 4, 64: 6, 256: 8}
"""Entries of a table -> bits of a code."""
LENGTHS = (1, 2, 4)
"""Values that an entry may have."""
GROUP_SHIFT = 7
"""Fractional bits of a group scale."""


def bits_of(entries: int) -> int:
    """Bits of a code for a table of so many entries, 0 for another number; by comparison, for traced sizes too."""
    return next((bits for count, bits in BITS.items() if count == entries), 0)


def _check(weight: Tensor, codebook: Tensor, table: Tensor | None, group_scale: Tensor | None, k: int) -> None:
    ok = codebook.dtype == torch.int8 and codebook.dim() == 3
    ok = ok and bits_of(codebook.shape[1]) > 0 and codebook.shape[2] in LENGTHS
    if not ok:
        raise unfit(OP, "codebook torch.int8 [T, 4 | 16 | 64 | 256, 1 | 2 | 4]", codebook)
    entries, length = codebook.shape[1:]
    if k <= 0 or k % length != 0:
        raise unfit(OP, f"K to be a multiple of the entries' length {length}", f"K={k}")
    width = code_bytes(k // length, bits_of(entries))
    ok = weight.dtype == torch.uint8 and weight.dim() == 2 and weight.shape[1] == width
    if not ok:
        raise unfit(OP, f"packed weight torch.uint8 [N, {width}] for K={k}", weight)
    n = weight.shape[0]
    if table is None:
        if codebook.shape[0] != 1:
            raise unfit(OP, "a single table, or the table of every row", f"{codebook.shape[0]} tables")
    else:
        ok = table.dtype == torch.uint8 and table.shape == (n,)
        if not ok:
            raise unfit(OP, f"table torch.uint8 [{n}]", table)
    if group_scale is not None and length != 1:
        raise unfit(OP, "entries of one value beside group scales", f"{length} values")
    check_groups(OP, n, k, group_scale)


def _reference(weight: Tensor, codebook: Tensor, table: Tensor | None, group_scale: Tensor | None, k: int) -> Tensor:
    _check(weight, codebook, table, group_scale, k)
    entries, length = codebook.shape[1:]
    index = unpack_codes(weight, k // length, bits_of(entries)).to(torch.int32)
    if table is not None:
        # a table that is not there must not be an access outside of memory on an accelerator
        index = index + table.to(torch.int32).clamp(max=codebook.shape[0] - 1).unsqueeze(1) * entries
    value = codebook.reshape(-1, length)[index].reshape(weight.shape[0], k)
    if group_scale is None:
        return value
    n, columns = group_scale.shape
    wide = value.view(n, columns, k // columns).to(torch.int32).mul_(group_scale.to(torch.int32).unsqueeze(2))
    wide.add_(1 << (GROUP_SHIFT - 1)).bitwise_right_shift_(GROUP_SHIFT)
    return wide.clamp_(-127, 127).to(torch.int8).view(n, k)


@define_op("codebook_to_int8")
def codebook_to_int8(
    weight: Tensor, codebook: Tensor, table: Tensor | None, group_scale: Tensor | None, k: int
) -> Tensor:
    """v[n, j * D + i] = c = codebook[table[n], code[n, j], i] without group_scale, else
    clamp((c * group_scale[n, k // g] + 64) >> 7, -127, 127) (arithmetic shift).

    weight: uint8 [N, ceil(b K / 8 D)], the codes as `pack_codes` packs them, b = log2 E bits each
    codebook: int8 [T, E, D] with E in 4, 16, 64, 256 and D in 1, 2, 4
    table: uint8 [N], below T; or None for T = 1
    group_scale: uint8 [N, K/g] with 7 fractional bits and g in 16, 32, 64, 128, only for D = 1; or None
    returns: int8 [N, K]
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(weight, codebook, table, group_scale, k)


@codebook_to_int8.register_fake
def _(weight: Tensor, codebook: Tensor, table: Tensor | None, group_scale: Tensor | None, k: int) -> Tensor:
    _check(weight, codebook, table, group_scale, k)
    return weight.new_empty((weight.shape[0], k), dtype=torch.int8)


@codebook_to_int8.register_cuda
def _(weight: Tensor, codebook: Tensor, table: Tensor | None, group_scale: Tensor | None, k: int) -> Tensor:
    _check(weight, codebook, table, group_scale, k)
    return dispatch.run(OP, _reference, weight, codebook, table, group_scale, k)
