"""Triton twin of `int8_linear_low_rank`: the low-rank product continues in the scaled accumulator."""

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
from .int8_linear import dot_dtype, grid, int8_options, operands, tile_product
from .int8_linear_add import gate_tile
from .low_rank_down import rows_of
from .rows import row_stride
from .tiles import ROUND_EACH_STEP, await_inputs, overlap, rows_contiguous, scaled, tile, tile_ids


@triton.jit
def add_branch(
    y, low_ptr, up_ptr, owner_ptr, rm, rn, M, N, R, UNIT, LOW_STRIDE,
    HAS_OWNER: tl.constexpr, DOT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y [BM, BN] + low times up, BR ranks at a time, for each layer that has columns in the tile."""
    rr = tl.arange(0, BR)
    rn = tl.minimum(rn, N - 1)
    low_at = low_ptr + tl.minimum(rm, M - 1).to(tl.int64)[:, None] * LOW_STRIDE + rr[None, :]
    up_at = up_ptr + rn.to(tl.int64)[None, :] * R + rr[:, None]
    # One stage: the buffers of the int8 product already fill the shared memory.
    if HAS_OWNER:
        owner = tl.load(owner_ptr + rn // UNIT).to(tl.int32)
        for layer in tl.range(tl.min(owner, axis=0), tl.max(owner, axis=0) + 1, num_stages=1):
            for r in tl.range(0, R, BR, num_stages=1):
                low = tl.load(low_at + layer * R + r, mask=(r + rr)[None, :] < R, other=0.0)
                up = tl.load(up_at + r, mask=((r + rr)[:, None] < R) & (owner == layer)[None, :], other=0.0)
                y = tl.dot(low.to(DOT), up.to(DOT), y, input_precision="ieee")
    else:
        for r in tl.range(0, R, BR, num_stages=1):
            low = tl.load(low_at + r, mask=(r + rr)[None, :] < R, other=0.0)
            up = tl.load(up_at + r, mask=(r + rr)[:, None] < R, other=0.0)
            y = tl.dot(low.to(DOT), up.to(DOT), y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["M", "TOKENS"])
def int8_linear_low_rank_kernel(
    x_ptr, w_ptr, scale_ptr, weight_scale_ptr, bias_ptr, low_ptr, up_ptr, owner_ptr, residual_ptr, gate_ptr, y_ptr,
    M, N, K, R, UNIT, LOW_STRIDE, TOKENS, GATE_STRIDE,
    HAS_BIAS: tl.constexpr, HAS_OWNER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr,
    ONE_SAMPLE: tl.constexpr, EVEN_K: tl.constexpr, DOT: tl.constexpr, BR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile per program; ONE_SAMPLE: no tile crosses from one sample of TOKENS rows into the next."""
    await_inputs()
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    acc = tile_product(x_ptr, w_ptr, pid_m, pid_n, M, N, K, tl.int32, EVEN_K, BM, BN, BK)
    rm = pid_m * BM + tl.arange(0, BM)
    rn = pid_n * BN + tl.arange(0, BN)
    y = scaled(acc, scale_ptr, weight_scale_ptr, bias_ptr, rm, rn, M, N, HAS_SCALE=True, HAS_BIAS=False)
    y = add_branch(y, low_ptr, up_ptr, owner_ptr, rm, rn, M, N, R, UNIT, LOW_STRIDE, HAS_OWNER, DOT, BR)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        y = y * gate_tile(gate_ptr, pid_m * BM, rm, rn, M, N, TOKENS, GATE_STRIDE, ONE_SAMPLE)
    at = rm.to(tl.int64)[:, None] * N + rn[None, :]
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def limits(op: str, dtype: torch.dtype | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    if dtype is not None and dtype not in (*FLOATS, torch.int8):
        return f"dtype {dtype} is not supported"
    return None


def supports(op: str, *_: Any) -> str | None:
    """The op has checked all that matters."""
    return None


def launch_options(m: int, n: int, tokens: int, rank: int, dtype: torch.dtype) -> tuple[dict[str, int], bool]:
    """Tile and ranks a step, and whether every tile lies in one sample of `tokens` rows."""
    if dtype == torch.float32:  # no tensor cores at full precision: few ranks a step, and small tiles
        options = {**(tile(64, 64, 128, 1, 4, 3) if m <= 64 else tile(64, 128, 128, 8, 8, 3)), "BR": 16}
    else:
        # From 64 rows on Hopper multiplies by warp groups: so do few tokens here, for their sums to have the same bits.
        options = {**int8_options(max(m, 64), n), "BR": 16 if rank <= 16 else 32}
    one_sample = tokens == m or tokens % options["BM"] == 0
    if not one_sample and options["BM"] == 128:
        options["num_warps"] = 8  # a gate for every row: four warps would spill
    return options, one_sample


def matmul_low_rank(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    branch: list[Tensor],
    stream: list[Tensor],
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch a kernel: Hopper's own where it is faster, else the portable one; the bits are the same."""
    (m, k), n = codes.shape, len(weight)
    y = torch.empty((m, n), dtype=out_dtype, device=codes.device)
    if y.numel() == 0:
        return y
    tensors = operands(codes, scale, weight, weight_scale, bias)
    low, up, owner = rows_of(branch[0]), rows_contiguous(branch[1]), [*branch[2:], None][0]
    residual = rows_contiguous(stream[0]) if stream else None
    gate = rows_of(stream[1]) if len(stream) > 1 else None
    ending = hopper.Ending(residual, gate, m if gate is None else m // len(gate), low, up, owner)
    like = "int8_linear_add" if stream else "int8_linear"  # a branch is a few more blocks of K: the same tiles are due
    if not hopper.launch(like, tensors, y, launch_table.lookup(like, y.device, m, n, k), ending):
        _launch(tensors, y, ending)
    return y


def _launch(tensors: tuple[Any, ...], y: Tensor, ending: hopper.Ending) -> None:
    """Launch the portable kernel."""
    codes, scale, weight, weight_scale, bias = tensors
    residual, gate, tokens, low, up, owner = ending
    assert low is not None
    assert up is not None
    (m, n), k, rank = y.shape, codes.shape[1], up.shape[1]
    options, one_sample = launch_options(m, n, tokens, rank, low.dtype)
    int8_linear_low_rank_kernel[grid(m, n, options)](
        codes,
        weight,
        scale,
        weight_scale,
        weight_scale if bias is None else bias,
        low,
        up,
        low if owner is None else owner,
        y if residual is None else residual,
        y if gate is None else gate,
        y,
        m,
        n,
        k,
        rank,
        ending.unit(n),
        row_stride(low),
        tokens,
        n if gate is None else row_stride(gate),
        HAS_BIAS=bias is not None,
        HAS_OWNER=owner is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_GATE=gate is not None,
        ONE_SAMPLE=one_sample,
        EVEN_K=k % options["BK"] == 0,
        DOT=dot_dtype(low.dtype),
        **options,
        **ROUND_EACH_STEP,
        **overlap(y.device),
    )


def run(op: str, *args: Any) -> Tensor:
    """`int8_linear_low_rank` by Triton."""
    return matmul_low_rank(*args)
