"""Triton twin of `int4_linear`, and the product that decodes, which `int4_weight_linear` uses too.

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

from .. import launch_table
from .hopper import note
from .int4_decode import decode, decode_bytes, facts, group_of, limits
from .int4_decode import example as packed_example
from .int8_linear import dot_dtype, grid, matmul_int8
from .int8_linear import example as int8_example
from .tiles import ROUND_EACH_STEP, await_inputs, overlap, rows_contiguous, store_scaled, tile, tile_ids

__all__ = ["facts", "limits", "note", "run", "supports"]

TUNABLE = ("int4_linear",)

FUSED_TOKENS = 64
"""Up to this many tokens the product decodes."""


@triton.jit(do_not_specialize=["M"])
def int4_linear_kernel(
    x_ptr, w_ptr, scale_ptr, weight_scale_ptr, group_ptr, bias_ptr, y_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile per program; INT8: int8 activations and an exact int32 sum, else float activations."""
    await_inputs()
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
        w = decode_bytes(packed, group_ptr, rn, columns, k // max(GROUP, 1), GROUP, BN, BK // 2)
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


def supports(op: str, x: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors; the op has checked the groups."""
    return limits(op, dtype=x.dtype)


def fused_options(m: int) -> dict[str, int]:
    """Tile of the product that decodes: BK is a multiple of every group."""
    if m <= 16:
        return tile(16, 32, 256, 1, 4, 4)
    return tile(64, 32, 128, 1, 4, 3)


def candidates(op: str, m: int, n: int, k: int) -> list[dict[str, int]]:
    """Launch options worth measuring; none for many tokens, where the kernels of other ops run."""
    if m > FUSED_TOKENS:
        return []
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    sizes = [(bn, bk, stages) for bn in (16, 32, 64) for bk in (128, 256) for stages in (3, 4)]
    return [tile(bm, bn, bk, 1, 4, stages) for bn, bk, stages in sizes]


def example(op: str, m: int, n: int, k: int, device: torch.device) -> tuple[Any, ...]:
    """Random arguments of the op."""
    codes, scale, _, weight_scale, bias, dtype = int8_example(op, m, n, k, device)
    packed, group_scale, _ = packed_example(op, m, n, k, device)
    return codes, scale, packed, weight_scale, group_scale, bias, dtype


def matmul_decoding(
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    options: dict[str, int] | None = None,
) -> Tensor:
    """Launch the kernel that decodes; `scale` None: float activations. `options` None: those of the heuristics."""
    m, k = x.shape
    n = weight.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    options = options or fused_options(m)
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
        GROUP=group_of(k, group_scale),
        **options,
        **(ROUND_EACH_STEP if int8 else {}),
        **overlap(y.device),
    )
    return y


def run(
    op: str,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`int4_linear` by Triton."""
    m, k = codes.shape
    if 0 < m <= FUSED_TOKENS:
        group = group_of(k, group_scale)
        options = launch_table.lookup(op, codes.device, m, len(weight), k, group=group)
        return matmul_decoding(codes, scale, weight, weight_scale, group_scale, bias, out_dtype, options)
    return matmul_int8(codes, scale, decode(weight, group_scale, k), weight_scale, bias, out_dtype)
