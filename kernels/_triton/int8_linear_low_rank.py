"""Triton twin of `int8_linear_low_rank`: the low-rank product continues in the scaled accumulator."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant_token import FLOATS
from .int8_linear import dot_dtype, grid, int8_options, tile_product
from .tiles import ROUND_EACH_STEP, await_inputs, overlap, rows_contiguous, scaled, tile, tile_ids


@triton.jit(do_not_specialize=["M"])
def int8_linear_low_rank_kernel(
    x_ptr, w_ptr, scale_ptr, weight_scale_ptr, bias_ptr, low_ptr, up_ptr, y_ptr, M, N, K, R,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, DOT: tl.constexpr, BR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile per program; the branch is walked BR ranks at a time."""
    await_inputs()
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    acc = tile_product(x_ptr, w_ptr, pid_m, pid_n, M, N, K, tl.int32, EVEN_K, BM, BN, BK)
    rm = pid_m * BM + tl.arange(0, BM)
    rn = pid_n * BN + tl.arange(0, BN)
    y = scaled(acc, scale_ptr, weight_scale_ptr, bias_ptr, rm, rn, M, N, HAS_SCALE=True, HAS_BIAS=False)
    rr = tl.arange(0, BR)
    low_at = low_ptr + tl.minimum(rm, M - 1).to(tl.int64)[:, None] * R + rr[None, :]
    up_at = up_ptr + tl.minimum(rn, N - 1).to(tl.int64)[None, :] * R + rr[:, None]
    # One stage: the buffers of the int8 product already fill the shared memory.
    for r in tl.range(0, R, BR, num_stages=1):
        low = tl.load(low_at + r, mask=(r + rr)[None, :] < R, other=0.0)
        up = tl.load(up_at + r, mask=(r + rr)[:, None] < R, other=0.0)
        y = tl.dot(low.to(DOT), up.to(DOT), y, input_precision="ieee")
    if HAS_BIAS:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


def limits(op: str, dtype: torch.dtype | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    if dtype is not None and dtype not in (*FLOATS, torch.int8):
        return f"dtype {dtype} is not supported"
    return None


def supports(op: str, *_: Any) -> str | None:
    """The op has checked all that matters."""
    return None


def launch_options(m: int, n: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and ranks a step; fp32 branches have no tensor cores at full precision and need small tiles."""
    if dtype == torch.float32:
        return {**tile(16 if m <= 16 else 32, 32, 128, 8, 4, 3), "BR": 16}
    return {**int8_options(m, n), "BR": 16 if rank <= 16 else 32}


def matmul_low_rank(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor,
    up: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch the kernel."""
    m, k = codes.shape
    n = weight.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=codes.device)
    if y.numel() == 0:
        return y
    options = launch_options(m, n, low.shape[1], low.dtype)
    int8_linear_low_rank_kernel[grid(m, n, options)](
        rows_contiguous(codes),
        rows_contiguous(weight),
        rows_contiguous(scale),
        rows_contiguous(weight_scale),
        weight_scale if bias is None else rows_contiguous(bias),
        rows_contiguous(low),
        rows_contiguous(up),
        y,
        m,
        n,
        k,
        low.shape[1],
        HAS_BIAS=bias is not None,
        EVEN_K=k % options["BK"] == 0,
        DOT=dot_dtype(low.dtype),
        **options,
        **ROUND_EACH_STEP,
        **overlap(y.device),
    )
    return y


def run(op: str, *args: Any) -> Tensor:
    """`int8_linear_low_rank` by Triton."""
    return matmul_low_rank(*args)
