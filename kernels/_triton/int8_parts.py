"""The last tiles of an int8 product on Hopper, in parts: see `int8_hopper`.

Programs walk over tiles in rounds, and in the last round most of them may have none. Those tiles are then cut along K,
a part for each program; the parts leave int32 sums, which add up exactly in any order, and one more kernel adds and
scales them.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .tiles import ROUND_EACH_STEP, await_inputs, overlap, scaled, tile_ids

ROWS = 16
"""Of a tile, for one program."""
FEWEST_BLOCKS = 3
"""Blocks of K that a part has at least: what starts and ends it takes as long as one."""


def shares(tiles: int, slots: int, blocks: int, most: int) -> tuple[int, int]:
    """How many tiles are computed whole by so many programs at once, and in how many parts each of the others is.

    most: parts of a tile at the most; 1 for whole tiles alone
    """
    left = tiles % slots
    if left == 0:
        return tiles, 1
    parts = min(most, slots // left, blocks // FEWEST_BLOCKS)
    if parts < 2:
        return tiles, 1
    # no part may be without a block
    return tiles - left, -(-blocks // -(-blocks // parts))


@triton.jit(do_not_specialize=["M", "WHOLE", "PARTS"])
def finish_sums_kernel(
    sums_ptr, scale_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, WHOLE, PARTS,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a tile: the sum of its PARTS, scaled."""
    await_inputs()
    number = tl.program_id(0)
    pid_m, pid_n = tile_ids(WHOLE + number, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    inside = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BN)
    at = sums_ptr + (number * PARTS * BM + inside)[:, None] * BN + columns[None, :]
    acc = tl.load(at)
    for part in range(1, PARTS):
        acc += tl.load(at + part * BM * BN)
    rm, rn = pid_m * BM + inside, pid_n * BN + columns
    y = scaled(acc, scale_ptr, weight_scale_ptr, bias_ptr, rm, rn, M, N, HAS_SCALE=True, HAS_BIAS=HAS_BIAS)
    to = y_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


def finish_sums(
    sums: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    whole: int,
    options: dict[str, Any],
) -> None:
    """Write the tiles from `whole` on to y [M, N].

    sums: int32 [tiles * parts, BM, BN]; options: those of the product
    """
    m, n = y.shape
    bm, bn = sums.shape[1:]
    tiles = -(-m // bm) * -(-n // bn) - whole
    vectors = (scale, weight_scale, weight_scale if bias is None else bias)
    constants = {"HAS_BIAS": bias is not None, "BM": bm, "BN": bn, "GROUP_M": options["GROUP_M"], "ROWS": ROWS}
    finish_sums_kernel[(tiles, bm // ROWS)](
        sums, *vectors, y, m, n, whole, len(sums) // tiles, **constants, **ROUND_EACH_STEP, **overlap(y.device)
    )
