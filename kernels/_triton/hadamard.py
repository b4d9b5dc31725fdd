"""Triton twin of `hadamard`: every block is a row of one tall [M*K/b, b] @ [b, b] product with +-1 entries."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..hadamard import matrix_on
from ..quant_token import FLOATS
from .int8_linear import dot_dtype
from .tiles import await_inputs, overlap, rows_contiguous


@triton.jit(do_not_specialize=["ROWS"])
def hadamard_kernel(
    x_ptr, signs_ptr, h_ptr, y_ptr, ROWS, BLOCKS, factor,
    HAS_SIGNS: tl.constexpr, DOT: tl.constexpr,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM blocks x BN of their SIZE outputs per program; BLOCKS of them make one token."""
    await_inputs()
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    inside = (rm < ROWS)[:, None]
    x_at = x_ptr + rm.to(tl.int64)[:, None] * SIZE + rk[None, :]
    signs_at = signs_ptr + (rm % BLOCKS)[:, None] * SIZE + rk[None, :]
    h_at = h_ptr + rk[:, None] * SIZE + rn[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, SIZE, BK):
        x = tl.load(x_at, mask=inside, other=0.0).to(DOT)
        if HAS_SIGNS:
            x = x * tl.load(signs_at).to(DOT)
        acc = tl.dot(x, tl.load(h_at).to(DOT), acc, input_precision="ieee")
        x_at += BK
        signs_at += BK
        h_at += BK * SIZE
    y_at = y_ptr + rm.to(tl.int64)[:, None] * SIZE + rn[None, :]
    tl.store(y_at, (acc * factor).to(y_ptr.dtype.element_ty), mask=inside)


def limits(op: str, dtype: torch.dtype | None = None, block_size: int | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    if dtype is not None and dtype not in FLOATS:
        return f"dtype {dtype} is not supported"
    if block_size is not None and not 16 <= block_size <= 1024:
        return f"block_size {block_size} is outside 16 to 1024"
    return None


def supports(op: str, x: Tensor, signs: Tensor | None, block_size: int, kind: str) -> str | None:
    """`limits` of these tensors."""
    return limits(op, dtype=x.dtype, block_size=block_size)


def launch_options(block_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps: a whole block of outputs per program up to 128."""
    if dtype == torch.float32:
        return {"BM": 32, "BN": min(block_size, 64), "BK": min(block_size, 32), "num_warps": 4}
    return {"BM": 64, "BN": min(block_size, 128), "BK": min(block_size, 64), "num_warps": 4}


def run(op: str, x: Tensor, signs: Tensor | None, block_size: int, kind: str) -> Tensor:
    """`hadamard` by Triton."""
    m, k = x.shape
    y = torch.empty((m, k), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    h = matrix_on(block_size, kind, x)
    options = launch_options(block_size, x.dtype)
    rows = m * (k // block_size)
    blocks = (triton.cdiv(rows, options["BM"]), block_size // options["BN"])
    hadamard_kernel[blocks](
        rows_contiguous(x),
        h if signs is None else rows_contiguous(signs),
        h,
        y,
        rows,
        k // block_size,
        block_size**-0.5,
        HAS_SIGNS=signs is not None,
        DOT=dot_dtype(x.dtype),
        SIZE=block_size,
        **options,
        **overlap(y.device),
    )
    return y
