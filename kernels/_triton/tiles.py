"""Pieces shared by the Triton kernels: tile order, rounding, the linear epilogue, launch helpers."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

TORCH_TO_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The same values with a dense row-major layout, copied only when needed."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def tile(bm: int, bn: int, bk: int, group_m: int, warps: int, stages: int) -> dict[str, int]:
    """Launch parameters of a product: tile, tile rows that share L2, warps, pipeline stages."""
    return {"BM": bm, "BN": bn, "BK": bk, "GROUP_M": group_m, "num_warps": warps, "num_stages": stages}


@triton.jit
def tile_ids(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Program id -> (tile row, tile column), walking GROUP_M rows at a time so that both operands stay in L2."""
    per_group = GROUP_M * num_n
    first = (pid // per_group) * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    inside = pid % per_group
    return first + inside % height, inside // height


@triton.jit
def round_to_int8(t):
    """Round half to even for |t| < 2**22, then int8: after adding 1.5 * 2**23 the low mantissa bits are the integer."""
    return (t + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def scaled(
    acc, scale_ptr, weight_scale_ptr, bias_ptr, rm, rn, M, N, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """acc * scale[m] * weight_scale[n] + bias[n] in fp32, for rows rm and columns rn, both of which may lie outside."""
    y = acc.to(tl.float32)
    if HAS_SCALE:
        y = y * tl.load(scale_ptr + rm, mask=rm < M, other=0.0)[:, None]
    y = y * tl.load(weight_scale_ptr + rn, mask=rn < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def store_scaled(
    y_ptr, acc, scale_ptr, weight_scale_ptr, bias_ptr, pid_m, pid_n, M, N,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store the `scaled` tile with both tails masked."""
    rm = pid_m * BM + tl.arange(0, BM)
    rn = pid_n * BN + tl.arange(0, BN)
    y = scaled(acc, scale_ptr, weight_scale_ptr, bias_ptr, rm, rn, M, N, HAS_SCALE, HAS_BIAS)
    at = y_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


INTERPRETED = not isinstance(store_scaled, triton.JITFunction)
"""True under TRITON_INTERPRET=1, where bfloat16 is stored but cannot be computed with."""

COMPILED = tl.constexpr(not INTERPRETED)

OVERLAP = True
"""Whether kernels start before the one before them has ended; see `await_inputs`."""


@triton.jit
def await_inputs():
    """Wait for the kernels launched before, then let the next one start: the first statement of every kernel.

    With programmatic dependent launch (Hopper and later) programs of a kernel are put on multiprocessors that the last
    programs of the one before leave idle, and what it takes to start them is hidden. Everything before has then ended
    and its stores are seen, for every kernel waits here: that of the one before is that of all before it.
    """
    if COMPILED and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@cache
def _can_overlap(device: torch.device) -> bool:
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlap(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that begins with `await_inputs`."""
    return {"launch_pdl": True} if OVERLAP and _can_overlap(device) else {}


ROUND_EACH_STEP = {"enable_fp_fusion": False}
"""Launch option that forbids a * b + c in one rounding: the int8 kernels then equal their references bit for bit."""
