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

from .. import quant_token_fp4 as fp4
from ..dispatch import is_on
from ..quant_token import LIMITS

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


BLOCK_LARGEST = tl.constexpr(float(fp4.BLOCK_LARGEST))


@triton.constexpr_function
def limit_of(int8, group):
    """The code of a token's largest magnitude; group: None, or that of `quant_token_fp4`."""
    if group is None:
        return LIMITS[torch.int8 if int8 else torch.float8_e4m3fn]
    return fp4.ROW_LARGEST if group else fp4.LARGEST


@triton.jit
def round_to_e2m1(t):
    """fp32: the nearest of 0, 1, 2, 3, 4, 6, 8, 12 with t's sign, ties to the even code, for |t| < 14.

    From 2**e to 2**(e + 1) these are 2**(e - 1) apart, or 1 below 4: added to t, 1.5 * 2**23 times that distance leaves
    no room for less.
    """
    size = tl.maximum(tl.abs(t), 2.0)
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # As fma, so that t is rounded before: the compiler would fuse its product with this sum.
    return tl.fma(power, -6291456.0, tl.fma(power, 6291456.0, t))


@triton.jit
def fp4_tile(t, FP4: tl.constexpr):
    """fp32 [R, C, W]: the codes of t as `quant_token_fp4` defines them; FP4 is its group."""
    if FP4 > 0:
        blocks = tl.reshape(t, (t.shape[0], t.shape[1], t.shape[2] // FP4, FP4))
        largest = tl.max(tl.abs(blocks), 3)
        block = tl.minimum(tl.maximum(tl.ceil(largest * (16.0 / 12.0)), 1.0), BLOCK_LARGEST)
        code = round_to_e2m1(blocks * tl.div_rn(tl.full(block.shape, 16.0, tl.float32), block)[:, :, :, None])
        levels = tl.reshape(tl.floor(code * (block * 0.0625)[:, :, :, None] + 0.5), t.shape)
    else:
        levels = round_to_e2m1(t)
    return levels


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

OVERLAP = is_on("VDIT_OVERLAP")
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
