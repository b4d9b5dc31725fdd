"""Triton twins of `int4_to_int8`, `int4_linear` and `int4_weight_linear`.

Few tokens: the packed weight is decoded tile by tile inside the product. Many tokens: it is decoded once into an int8
scratch and the kernels of the int8 ops run, because decoding again for every row of tiles costs more.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant_token import FLOATS
from .int8_linear import dot_dtype, grid, matmul_int8, matmul_weight_only
from .tiles import ROUND_EACH_STEP, rows_contiguous, store_scaled, tile, tile_ids

FUSED_TOKENS = 64
"""Up to this many tokens the product decodes; float32 never does, its tiles would not fit in registers."""


@triton.jit
def decode_tile(packed, group_ptr, rows, columns, first_group, GROUP: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """uint8 [R, B] -> int8 [R, 2B] in k order; GROUP is 0 without group scales, else it divides 2B."""
    signed = packed.to(tl.int8, bitcast=True)
    both = tl.interleave((signed << 4) >> 4, signed >> 4)
    if GROUP > 0:
        COUNT: tl.constexpr = 2 * B // GROUP
        groups = first_group + tl.arange(0, COUNT)
        at = group_ptr + rows[:, None] * columns + groups[None, :]
        scale = tl.load(at, mask=groups[None, :] < columns, other=0).to(tl.int16)
        wide = tl.reshape(both, (R, COUNT, GROUP)).to(tl.int16) * scale[:, :, None]
        both = tl.reshape(((wide + 8) >> 4).to(tl.int8), (R, 2 * B))
    return both


@triton.jit
def int4_to_int8_kernel(
    w_ptr, group_ptr, out_ptr, N, K, GROUP: tl.constexpr, R: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Decode R rows x 2B columns per program."""
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    safe = tl.minimum(rows, N - 1)
    width = (K + 1) // 2
    rb = tl.program_id(1) * B + tl.arange(0, B)
    packed = tl.load(w_ptr + safe[:, None] * width + rb[None, :], mask=rb[None, :] < width, other=0)
    decoded = decode_tile(
        packed, group_ptr, safe, K // max(GROUP, 1), tl.program_id(1) * (2 * B // max(GROUP, 1)), GROUP, R, B
    )
    rk = tl.program_id(1) * 2 * B + tl.arange(0, 2 * B)
    tl.store(out_ptr + rows[:, None] * K + rk[None, :], decoded, mask=(rows < N)[:, None] & (rk < K)[None, :])


@triton.jit(do_not_specialize=["M"])
def int4_linear_kernel(
    x_ptr, w_ptr, scale_ptr, weight_scale_ptr, group_ptr, bias_ptr, y_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile per program; INT8: int8 activations and an exact int32 sum, else float activations."""
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rm = tl.minimum(pid_m * BM + tl.arange(0, BM), M - 1).to(tl.int64)
    rn = tl.minimum(pid_n * BN + tl.arange(0, BN), N - 1).to(tl.int64)
    rk = tl.arange(0, BK)
    rb = tl.arange(0, BK // 2)
    width = (K + 1) // 2
    x_at = x_ptr + rm[:, None] * K + rk[None, :]
    w_at = w_ptr + rn[:, None] * width + rb[None, :]
    columns = K // max(GROUP, 1)
    if INT8:
        acc = tl.zeros((BM, BN), dtype=tl.int32)
    else:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_at)
            packed = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k + rk)[None, :] < K, other=0)
            packed = tl.load(w_at, mask=(k // 2 + rb)[None, :] < width, other=0)
        w = decode_tile(packed, group_ptr, rn, columns, k // max(GROUP, 1), GROUP, BN, BK // 2)
        if INT8:
            acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x.to(DOT), w.to(DOT).T, acc, input_precision="ieee")
        x_at += BK
        w_at += BK // 2
    store_scaled(
        y_ptr, acc, scale_ptr, weight_scale_ptr, bias_ptr, pid_m, pid_n, M, N,
        HAS_SCALE=INT8, HAS_BIAS=HAS_BIAS, BM=BM, BN=BN,
    )  # fmt: skip


def limits(op: str, dtype: torch.dtype | None = None, group: int | None = None, **_: Any) -> str | None:
    """Why the kernels cannot take such an input; None when they can."""
    if dtype is not None and dtype not in (*FLOATS, torch.int8, torch.uint8):
        return f"dtype {dtype} is not supported"
    if group is not None and group not in (16, 32, 64, 128):
        return f"groups of {group} are not supported"
    return None


def supports(op: str, x: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors; the op has checked the groups."""
    return limits(op, dtype=x.dtype)


def decode_options(k: int) -> dict[str, int]:
    """Block of the decode kernel: 2B values, a multiple of every group, of R rows."""
    return {"R": 16, "B": 64 if k <= 256 else 256, "num_warps": 4}


def fused_options(m: int) -> dict[str, int]:
    """Tile of the product that decodes: BK is a multiple of every group."""
    if m <= 16:
        return tile(16, 32, 256, 1, 4, 4)
    return tile(64, 32, 128, 1, 4, 3)


def _group(k: int, group_scale: Tensor | None) -> int:
    return 0 if group_scale is None else k // group_scale.shape[1]


def decode(weight: Tensor, group_scale: Tensor | None, k: int) -> Tensor:
    """Launch the decode kernel."""
    n = weight.shape[0]
    out = torch.empty((n, k), dtype=torch.int8, device=weight.device)
    if n:
        options = decode_options(k)
        blocks = (triton.cdiv(n, options["R"]), triton.cdiv(k, 2 * options["B"]))
        weight = rows_contiguous(weight)
        group_ptr = weight if group_scale is None else rows_contiguous(group_scale)
        int4_to_int8_kernel[blocks](weight, group_ptr, out, n, k, GROUP=_group(k, group_scale), **options)
    return out


def _fused(
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    m, k = x.shape
    n = weight.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    options = fused_options(m)
    int8 = x.dtype == torch.int8
    int4_linear_kernel[grid(m, n, options)](
        rows_contiguous(x),
        rows_contiguous(weight),
        weight_scale if scale is None else rows_contiguous(scale),
        rows_contiguous(weight_scale),
        weight if group_scale is None else rows_contiguous(group_scale),
        weight_scale if bias is None else rows_contiguous(bias),
        y,
        m,
        n,
        k,
        HAS_BIAS=bias is not None,
        EVEN_K=k % options["BK"] == 0,
        INT8=int8,
        DOT=tl.int8 if int8 else dot_dtype(x.dtype),
        GROUP=_group(k, group_scale),
        **options,
        **(ROUND_EACH_STEP if int8 else {}),
    )
    return y


def _weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, group_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    if x.shape[0] <= FUSED_TOKENS and x.dtype != torch.float32:
        return _fused(x, None, weight, weight_scale, group_scale, bias, x.dtype)
    return matmul_weight_only(x, decode(weight, group_scale, x.shape[1]), weight_scale, bias)


def _int8_activations(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if codes.shape[0] <= FUSED_TOKENS:
        return _fused(codes, scale, weight, weight_scale, group_scale, bias, out_dtype)
    return matmul_int8(codes, scale, decode(weight, group_scale, codes.shape[1]), weight_scale, bias, out_dtype)


def run(op: str, *args: Any) -> Tensor:
    """One of the three int4 ops by Triton."""
    if op == "int4_to_int8":
        return decode(*args)
    return _int8_activations(*args) if op == "int4_linear" else _weight_only(*args)
