"""Triton twin of `gate_add`."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant_token import FLOATS
from .rows import row_stride
from .tiles import ROUND_EACH_STEP, await_inputs, overlap, rows_contiguous

TILE = {"BM": 16, "BN": 128, "num_warps": 4}
"""A lane reads 16 bytes of bf16 at a time, twice; 128 divides the widths of all models known here."""


@triton.jit(do_not_specialize=["M", "TOKENS"])
def gate_add_kernel(
    residual_ptr, branch_ptr, gate_ptr, y_ptr, residual_stride, branch_stride, gate_stride, M, N, TOKENS,
    HAS_GATE: tl.constexpr, ONE_SAMPLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile per program; ONE_SAMPLE: no tile crosses from one sample of TOKENS rows into the next."""
    await_inputs()
    across = tl.cdiv(N, BN)
    first = tl.program_id(0) // across * BM
    row = first + tl.arange(0, BM)
    n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    inside = (row < M)[:, None] & (n < N)[None, :]
    at = row.to(tl.int64)[:, None]
    y = tl.load(branch_ptr + at * branch_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        if ONE_SAMPLE:
            sample = (first // TOKENS).to(tl.int64)
            gate = tl.load(gate_ptr + sample * gate_stride + n, mask=n < N, other=0.0)[None, :]
        else:
            sample = (row // TOKENS).to(tl.int64)[:, None]
            gate = tl.load(gate_ptr + sample * gate_stride + n[None, :], mask=inside, other=0.0)
        y = gate.to(tl.float32) * y
    y = tl.load(residual_ptr + at * residual_stride + n[None, :], mask=inside, other=0.0).to(tl.float32) + y
    tl.store(y_ptr + at * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def limits(op: str, dtype: torch.dtype | None = None, **_: Any) -> str | None:
    """Why the kernel cannot take such an input; None when it can."""
    return f"dtype {dtype} is not supported" if dtype is not None and dtype not in FLOATS else None


def supports(op: str, *_: Any) -> str | None:
    """The op has checked all that matters."""
    return None


def is_one_sample(m: int, tokens: int) -> bool:
    """Whether every tile lies in one sample of `tokens` rows."""
    return tokens == m or tokens % TILE["BM"] == 0


def run(op: str, residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """`gate_add` by Triton."""
    m, n = residual.shape
    y = torch.empty((m, n), dtype=residual.dtype, device=residual.device)
    if y.numel() == 0:
        return y
    residual, branch, rows = (
        t if t.stride(1) == 1 else rows_contiguous(t) for t in (residual, branch, residual if gate is None else gate)
    )
    tokens = m if gate is None else m // len(gate)
    gate_add_kernel[(triton.cdiv(m, TILE["BM"]) * triton.cdiv(n, TILE["BN"]),)](
        residual,
        branch,
        rows,
        y,
        *map(row_stride, (residual, branch, rows)),
        m,
        n,
        tokens,
        HAS_GATE=gate is not None,
        ONE_SAMPLE=is_one_sample(m, tokens),
        **TILE,
        **ROUND_EACH_STEP,
        **overlap(y.device),
    )
    return y
