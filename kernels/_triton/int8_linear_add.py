"""Triton twin of `int8_linear_add`: the int8 product with gate and residual in its epilogue."""

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
from .int8_linear import candidates as plain_candidates
from .int8_linear import example as plain_example
from .int8_linear import grid, int8_options, operands, tile_product
from .tiles import ROUND_EACH_STEP, await_inputs, overlap, rows_contiguous, scaled, tile_ids

__all__ = ["limits", "note", "run", "supports"]

TUNABLE = ("int8_linear_add",)


@triton.jit
def gate_tile(gate_ptr, first, rm, rn, M, N, TOKENS, GATE_STRIDE, ONE_SAMPLE: tl.constexpr):
    """fp32 gates of columns rn, [1, BN]; where samples meet, of rows rm too, [BM, BN]. `first` is the first row."""
    if ONE_SAMPLE:
        sample = (first // TOKENS).to(tl.int64)
        gate = tl.load(gate_ptr + sample * GATE_STRIDE + rn, mask=rn < N, other=0.0)[None, :]
    else:
        sample = (rm // TOKENS).to(tl.int64)
        inside = (rm < M)[:, None] & (rn < N)[None, :]
        gate = tl.load(gate_ptr + sample[:, None] * GATE_STRIDE + rn[None, :], mask=inside, other=0.0)
    return gate.to(tl.float32)


@triton.jit(do_not_specialize=["M", "TOKENS"])
def int8_linear_add_kernel(
    x_ptr, w_ptr, scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, gate_ptr, y_ptr, M, N, K, TOKENS, GATE_STRIDE,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, ONE_SAMPLE: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile per program; ONE_SAMPLE: no tile crosses from one sample of TOKENS rows into the next."""
    await_inputs()
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    acc = tile_product(x_ptr, w_ptr, pid_m, pid_n, M, N, K, tl.int32, EVEN_K, BM, BN, BK)
    rm = pid_m * BM + tl.arange(0, BM)
    rn = pid_n * BN + tl.arange(0, BN)
    y = scaled(acc, scale_ptr, weight_scale_ptr, bias_ptr, rm, rn, M, N, HAS_SCALE=True, HAS_BIAS=HAS_BIAS)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    if HAS_GATE:
        y = y * gate_tile(gate_ptr, pid_m * BM, rm, rn, M, N, TOKENS, GATE_STRIDE, ONE_SAMPLE)
    at = rm.to(tl.int64)[:, None] * N + rn[None, :]
    y = y + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def limits(op: str, dtype: torch.dtype | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    if dtype is not None and dtype not in (*FLOATS, torch.int8):
        return f"dtype {dtype} is not supported"
    return None


def supports(op: str, *_: Any) -> str | None:
    """The op has checked all that matters."""
    return None


def candidates(op: str, m: int, n: int, k: int) -> list[dict[str, Any]]:
    """Launch options worth measuring."""
    return plain_candidates(op, m, n, k)


def example(op: str, m: int, n: int, k: int, device: torch.device) -> tuple[Any, ...]:
    """Random arguments of the op: samples of 256 tokens, as of a DiT at 256 px, where m allows."""
    residual = torch.randn(m, n, dtype=torch.bfloat16, device=device)
    gate = torch.randn(m // 256 if m % 256 == 0 else 1, n, dtype=torch.bfloat16, device=device)
    return *plain_example(op, m, n, k, device)[:5], residual, gate


def launch_options(m: int, n: int, tokens: int, options: dict[str, int] | None = None) -> tuple[dict[str, int], bool]:
    """Tile, and whether every tile lies in one sample of `tokens` rows."""
    chosen = dict(options or int8_options(m, n))
    one_sample = tokens == m or tokens % chosen["BM"] == 0
    # the residual of the tile beside its sums: four warps spill on some GPUs, and with a gate for every row on all
    if chosen["BM"] == 128 and (options is None or not one_sample):
        chosen["num_warps"] = 8
    return chosen, one_sample


def run(
    op: str,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """`int8_linear_add` by Triton."""
    m, k = codes.shape
    n = weight.shape[0]
    y = torch.empty((m, n), dtype=residual.dtype, device=codes.device)
    if y.numel() == 0:
        return y
    if gate is not None and gate.stride(1) != 1:
        gate = gate.contiguous()
    tokens = m if gate is None else m // gate.shape[0]
    tensors = operands(codes, scale, weight, weight_scale, bias)
    residual = rows_contiguous(residual)
    measured = launch_table.lookup(op, codes.device, m, n, k)
    if hopper.launch(op, tensors, y, measured, hopper.Ending(residual, gate, tokens)):
        return y
    portable = None if measured is None or "variant" in measured else measured
    options, one_sample = launch_options(m, n, tokens, portable)
    codes, scale, weight, weight_scale, bias = tensors
    int8_linear_add_kernel[grid(m, n, options)](
        codes,
        weight,
        scale,
        weight_scale,
        weight_scale if bias is None else bias,
        residual,
        residual if gate is None else gate,
        y,
        m,
        n,
        k,
        tokens,
        n if gate is None else gate.stride(0),
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        ONE_SAMPLE=one_sample,
        EVEN_K=k % options["BK"] == 0,
        **options,
        **ROUND_EACH_STEP,
        **overlap(y.device),
    )
    return y
