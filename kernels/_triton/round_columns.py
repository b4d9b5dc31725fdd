"""Triton twin of `round_columns`: a few rows per program, which stay in registers from the first column to the last.

Rows do not depend on each other, and a row's columns are a chain: what counts is how long one step of it takes. So a
program is one warp, whose lanes hold the columns of a row: a column is had and spread without shared memory. The level
is found by bisection, of the kind that torch.searchsorted does, in middles that the cache holds after their first use.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import ROUND_EACH_STEP, await_inputs, overlap, rows_contiguous

MAX_COLUMNS = 128


@triton.jit
def round_columns_kernel(
    x_ptr, level_ptr, middle_ptr, group_ptr, factor_ptr, index_ptr, error_ptr, N, C, L, x_stride, factor_stride,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program; COLUMNS >= C; STEPS halvings leave one of L."""
    await_inputs()
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    real = rows < N
    inside = real[:, None] & (c < C)[None, :]
    # Targets, and from column to column the errors in their place.
    x = tl.load(x_ptr + rows[:, None] * x_stride + c[None, :], mask=inside, other=0.0)
    index = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for j in range(C):
        own = (c == j)[None, :]
        target = tl.sum(tl.where(own, x, 0.0), 1)
        row = tl.load(group_ptr + j) * N + rows
        first = tl.zeros((ROWS,), dtype=tl.int32)
        last = first + (L - 1)
        for _ in tl.static_range(STEPS):
            open_ = first < last
            half = (first + last) >> 1
            # False for nan, which so ends above all middles.
            above = tl.load(middle_ptr + row * (L - 1) + half, mask=real & open_, other=0.0) >= target
            last = tl.where(open_ & above, half, last)
            first = tl.where(open_ & (above == 0), half + 1, first)
        level = tl.load(level_ptr + row * L + first, mask=real, other=0.0)
        error = tl.div_rn(target - level, tl.load(factor_ptr + j * factor_stride + j))[:, None]
        later = c > j
        spread = tl.load(factor_ptr + j * factor_stride + c, mask=later & (c < C), other=0.0)[None, :]
        x = tl.where(later[None, :], x - error * spread, tl.where(own, error, x))
        index = tl.where(own, first[:, None], index)
    at = rows[:, None] * C + c[None, :]
    tl.store(index_ptr + at, index.to(tl.int64), mask=inside)
    tl.store(error_ptr + at, x, mask=inside)


def limits(op: str, k: int | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input, of `k` columns; None when it can."""
    if k is not None and k > MAX_COLUMNS:
        return f"a block of {k} columns is larger than {MAX_COLUMNS}"
    return None


def supports(op: str, targets: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors."""
    return limits(op, k=targets.shape[1])


def launch_options(levels: int) -> dict[str, Any]:
    """Tile, warps and steps for so many levels. Four rows hide some of each other's waiting, and leave a weight of 1024
    rows programs for every multiprocessor."""
    return {"STEPS": (levels - 1).bit_length(), "ROWS": 4, "COLUMNS": MAX_COLUMNS, "num_warps": 1, **ROUND_EACH_STEP}


def run(
    op: str, targets: Tensor, levels: Tensor, middles: Tensor, group: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """`round_columns` by Triton."""
    n, c = targets.shape
    index = torch.empty((n, c), dtype=torch.int64, device=targets.device)
    errors = torch.empty((n, c), dtype=torch.float32, device=targets.device)
    # Blocks of wider matrices are read where they are.
    targets, factor = (x if x.stride(1) == 1 else x.contiguous() for x in (targets, factor))
    if targets.numel():
        options = launch_options(levels.shape[2])
        round_columns_kernel[(triton.cdiv(n, options["ROWS"]),)](
            targets, rows_contiguous(levels), rows_contiguous(middles), rows_contiguous(group), factor, index, errors,
            n, c, levels.shape[2], targets.stride(0), factor.stride(0), **options, **overlap(targets.device),
        )  # fmt: skip
    return index, errors
