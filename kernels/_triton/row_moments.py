"""What a norm needs to know of every row, for kernels that read a row in parts."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm_quant import Norm
from .rows import aligned_rows, row_stride
from .tiles import ROUND_EACH_STEP, await_inputs, overlap


@triton.jit
def load_block(ptr, at, k, K, EVEN_K: tl.constexpr):
    """fp32 columns k [1, BK] of the rows that start at `at`; 0 beyond K."""
    if EVEN_K:
        x = tl.load(ptr + at + k)
    else:
        x = tl.load(ptr + at + k, mask=k < K, other=0.0)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def moments_kernel(
    x_ptr, moments_ptr, x_stride, M, K, eps, LAYER: tl.constexpr, EVEN_K: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """moments [2, M]: factor and lead of which xhat = x * factor + lead."""
    await_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(row, M - 1).to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        x = load_block(x_ptr, at, (start + tl.arange(0, COLUMNS))[None, :], K, EVEN_K)
        sums += x
        squares = tl.fma(x, x, squares)
    mean = tl.sum(sums, axis=1) / K
    variance = tl.sum(squares, axis=1) / K
    if LAYER:
        variance = tl.maximum(variance - mean * mean, 0.0)
    factor = tl.rsqrt(variance + eps)
    tl.store(moments_ptr + row, factor, mask=row < M)
    if LAYER:
        tl.store(moments_ptr + M.to(tl.int64) + row, -mean * factor, mask=row < M)


def moments_options(k: int) -> dict[str, int]:
    """Tile and warps of a program that makes moments."""
    columns = min(2048, triton.next_power_of_2(k))
    return {"ROWS": 8192 // columns, "COLUMNS": columns, "num_warps": 4}


def moments_of(x: Tensor, norm: Norm) -> Tensor:
    """fp32 [2, M] of `moments_kernel`."""
    x = aligned_rows(x)  # else the order of a row's sums would follow from how rows lie
    m, k = x.shape
    moments, options = torch.empty((2, m), dtype=torch.float32, device=x.device), moments_options(k)
    moments_kernel[(triton.cdiv(m, options["ROWS"]),)](
        x, moments, row_stride(x), m, k, norm.eps, LAYER=norm.kind == "layer", EVEN_K=k % options["COLUMNS"] == 0,
        **options, **ROUND_EACH_STEP, **overlap(x.device),
    )  # fmt: skip
    return moments
