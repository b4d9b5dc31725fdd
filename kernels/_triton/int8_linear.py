"""Triton twin of `int8_linear`, and the product of `int8_weight_linear` for many tokens."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_table
from ..quant_token import FLOATS
from . import hopper
from .hopper import note
from .tiles import (
    INTERPRETED,
    ROUND_EACH_STEP,
    TORCH_TO_TRITON,
    await_inputs,
    overlap,
    rows_contiguous,
    store_scaled,
    tile,
    tile_ids,
)

__all__ = ["limits", "note", "run", "supports"]

TUNABLE = ("int8_linear",)


@triton.jit
def tile_product(
    x_ptr, w_ptr, pid_m, pid_n, M, N, K, ACC: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc[BM, BN] in ACC of one tile of x [M, K] times w [N, K], both K contiguous and of one 8-bit type."""
    # Rows beyond the edge repeat the last one: their results are never stored, and the loads need no row mask.
    rm = tl.minimum(pid_m * BM + tl.arange(0, BM), M - 1).to(tl.int64)
    rn = tl.minimum(pid_n * BN + tl.arange(0, BN), N - 1).to(tl.int64)
    rk = tl.arange(0, BK)
    x_at = x_ptr + rm[:, None] * K + rk[None, :]
    w_at = w_ptr + rn[None, :] * K + rk[:, None]
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k + rk)[None, :] < K, other=0.0)
            w = tl.load(w_at, mask=(k + rk)[:, None] < K, other=0.0)
        acc = tl.dot(x, w, acc, out_dtype=ACC)
        x_at += BK
        w_at += BK
    return acc


@triton.jit(do_not_specialize=["M"])
def int8_linear_kernel(
    x_ptr, w_ptr, scale_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Int8 x int8 -> int32, one [BM, BN] tile per program; both operands K contiguous."""
    await_inputs()
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    acc = tile_product(x_ptr, w_ptr, pid_m, pid_n, M, N, K, tl.int32, EVEN_K, BM, BN, BK)
    store_scaled(
        y_ptr, acc, scale_ptr, weight_scale_ptr, bias_ptr, pid_m, pid_n, M, N,
        HAS_SCALE=True, HAS_BIAS=HAS_BIAS, BM=BM, BN=BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def int8_weight_linear_kernel(
    x_ptr, w_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Float x int8: the weight tile becomes DOT (exact: |w| <= 127) on its way to the dot."""
    await_inputs()
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rm = tl.minimum(pid_m * BM + tl.arange(0, BM), M - 1).to(tl.int64)
    rn = tl.minimum(pid_n * BN + tl.arange(0, BN), N - 1).to(tl.int64)
    rk = tl.arange(0, BK)
    x_at = x_ptr + rm[:, None] * K + rk[None, :]
    w_at = w_ptr + rn[None, :] * K + rk[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k + rk)[None, :] < K, other=0.0)
            w = tl.load(w_at, mask=(k + rk)[:, None] < K, other=0)
        acc = tl.dot(x.to(DOT), w.to(DOT), acc, input_precision="ieee")
        x_at += BK
        w_at += BK
    store_scaled(
        y_ptr, acc, weight_scale_ptr, weight_scale_ptr, bias_ptr, pid_m, pid_n, M, N,
        HAS_SCALE=False, HAS_BIAS=HAS_BIAS, BM=BM, BN=BN,
    )  # fmt: skip


def limits(op: str, dtype: torch.dtype | None = None, **_: Any) -> str | None:
    """Why the kernels cannot take such an input; None when they can."""
    if dtype is not None and dtype not in (*FLOATS, torch.int8):
        return f"dtype {dtype} is not supported"
    return None


def supports(op: str, x: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors."""
    return limits(op, dtype=x.dtype)


def int8_options(m: int, n: int) -> dict[str, int]:
    """Tile for int8 x int8: two 128 x 128 programs fit on one Hopper SM; narrow tiles keep small batches spread out."""
    if m <= 16:
        return tile(16, 32, 256, 1, 4, 4)
    if m <= 32:
        return tile(32, 64, 256, 1, 4, 3)
    if m <= 64:
        return tile(64, 64, 128, 1, 4, 4)
    if m * n <= 128 * 128 * 132:
        return tile(64, 128, 128, 8, 4, 3)
    return tile(128, 128, 128, 8, 4, 3)


def candidates(op: str, m: int, n: int, k: int) -> list[dict[str, int]]:
    """Launch options worth measuring."""
    if m <= 64:
        return [int8_options(m, n), tile(64, 64, 128, 1, 4, 3), tile(64, 128, 128, 1, 4, 3)]
    tiles = ((64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3), (128, 256, 8, 3))
    portable = [tile(bm, bn, 128, 8, warps, stages) for bm, bn, warps, stages in tiles]
    return portable + hopper.candidates(op, m, n, k)


def example(op: str, m: int, n: int, k: int, device: torch.device) -> tuple[Any, ...]:
    """Random arguments of the op."""
    codes, weight = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    scales = (torch.rand(rows, device=device) for rows in (m, n))
    return codes, next(scales), weight, next(scales), None, torch.bfloat16


def weight_only_options(m: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile for float x int8 weights; fp32 has no tensor cores at full precision and needs small tiles."""
    if dtype == torch.float32:
        return tile(16 if m <= 16 else 32, 32, 32, 8, 4, 3)
    if m <= 16:
        return tile(16, 32, 128, 1, 4, 4)
    if m <= 64:
        return tile(64, 64, 64, 1, 4, 4)
    return tile(128, 128, 64, 8, 8, 3)


def weight_only_candidates() -> list[dict[str, int]]:
    """Launch options worth measuring for float x int8 weights, in 16 bits and for many tokens."""
    tiles = [(64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3)]
    tiles += [(128, 256, 64, 8, 3)]
    return [tile(bm, bn, bk, 8, warps, stages) for bm, bn, bk, warps, stages in tiles]


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which a dot with activations of `dtype` is done."""
    return tl.float32 if INTERPRETED else TORCH_TO_TRITON[dtype]


def grid(m: int, n: int, options: dict[str, int]) -> tuple[int]:
    """One program per output tile."""
    return (triton.cdiv(m, options["BM"]) * triton.cdiv(n, options["BN"]),)


def operands(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors of a product, all dense."""
    return (
        rows_contiguous(codes),
        rows_contiguous(scale),
        rows_contiguous(weight),
        rows_contiguous(weight_scale),
        None if bias is None else rows_contiguous(bias),
    )


def matmul_int8(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Launch an int8 x int8 kernel: Hopper's own where it is faster, else the portable one; the bits are the same."""
    m, k = codes.shape
    n = weight.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=codes.device)
    if y.numel() == 0:
        return y
    options = launch_table.lookup("int8_linear", codes.device, m, n, k)
    tensors = operands(codes, scale, weight, weight_scale, bias)
    if hopper.launch("int8_linear", tensors, y, options):
        return y
    if options is None or "variant" in options:
        options = int8_options(m, n)
    codes, scale, weight, weight_scale, bias = tensors
    int8_linear_kernel[grid(m, n, options)](
        codes,
        weight,
        scale,
        weight_scale,
        weight_scale if bias is None else bias,
        y,
        m,
        n,
        k,
        HAS_BIAS=bias is not None,
        EVEN_K=k % options["BK"] == 0,
        **options,
        **ROUND_EACH_STEP,
        **overlap(y.device),
    )
    return y


def matmul_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, options: dict[str, int] | None = None
) -> Tensor:
    """Launch the float x int8 kernel. `options` None: those of the heuristics."""
    m, k = x.shape
    n = weight.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    options = options or weight_only_options(m, x.dtype)
    int8_weight_linear_kernel[grid(m, n, options)](
        rows_contiguous(x),
        rows_contiguous(weight),
        rows_contiguous(weight_scale),
        weight_scale if bias is None else rows_contiguous(bias),
        y,
        m,
        n,
        k,
        HAS_BIAS=bias is not None,
        EVEN_K=k % options["BK"] == 0,
        DOT=dot_dtype(x.dtype),
        **options,
        **overlap(y.device),
    )
    return y


def run(op: str, *args: Any) -> Tensor:
    """`int8_linear` by Triton."""
    return matmul_int8(*args)
