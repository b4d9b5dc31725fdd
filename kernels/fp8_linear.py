"""Linear layers with fp8 (e4m3) weights and activations, one scale per token and one per output row.

e4m3 (Micikevicius et al. 2022, arXiv 2209.05433): 4 exponent bits, 3 mantissa bits, largest value 448, no infinity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .int8_linear import check_vectors, unfit
from .op import define_op
from .quant_token import FLOATS, TINY

E4M3 = torch.float8_e4m3fn
LIMIT = 448.0
"""Largest e4m3 value."""


def lacks_fp8(device: torch.device) -> str | None:
    """Why this GPU has no fp8 here; None when it has, and for a device that is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip is not None:
        return "e4m3 has no kernel on AMD GPUs"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "fp8 needs compute capability 8.9"
    return None


def _check_float(x: Tensor) -> None:
    ok = x.dim() == 2 and x.dtype in FLOATS and x.shape[1] > 0
    if not ok:
        raise unfit("quant_token_fp8", "x float32, bfloat16 or float16 [M, K] with K > 0", x)


def _quant_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_float(x)
    wide = x.float()
    amax = wide.abs().amax(dim=1).clamp_min_(TINY)
    # As tensors: dividing by or into a Python number is a multiplication with a rounded reciprocal on some devices.
    limit = torch.full_like(amax, LIMIT)
    codes = (wide * (limit / amax).unsqueeze(1)).clamp_(-LIMIT, LIMIT).to(E4M3)
    return codes, amax / limit


@define_op("quant_token_fp8")
def quant_token_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """codes[m, k] = e4m3(x[m, k] * (448 / amax[m])), scale[m] = amax[m] / 448, amax[m] = max_k |x[m, k]|.

    Rounds half to even and saturates at 448.

    x: fp32 | bf16 | fp16 [M, K]
    returns codes: float8_e4m3fn [M, K]
    returns scale: fp32 [M]; positive and finite for finite x, not finite for a row that holds inf or nan
    Raises ValueError for another dtype or rank.
    """
    return _quant_reference(x)


@quant_token_fp8.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_float(x)
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty((x.shape[0],), dtype=torch.float32)


@quant_token_fp8.register_cuda
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return dispatch.run("quant_token_fp8", _quant_reference, x)


def _check(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    op = "fp8_linear"
    if codes.dtype != E4M3 or codes.dim() != 2:
        raise unfit(op, f"codes {E4M3} [M, K]", codes)
    ok = scale.dtype == torch.float32 and scale.shape == (codes.shape[0],)
    if not ok:
        raise unfit(op, f"scale torch.float32 of shape ({codes.shape[0]},)", scale)
    if out_dtype not in FLOATS:
        raise unfit(op, "out_dtype float32, bfloat16 or float16", out_dtype)
    k = codes.shape[1]
    ok = weight.dtype == E4M3 and weight.dim() == 2 and weight.shape[1] == k
    if not ok:
        raise unfit(op, f"weight {E4M3} [N, {k}]", weight)
    check_vectors(op, weight.shape[0], weight_scale, bias)


def _reference(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias, out_dtype)
    y = F.linear(codes.float(), weight.float()).mul_(scale.unsqueeze(1)).mul_(weight_scale)
    if bias is not None:
        y.add_(bias.float())
    return y.to(out_dtype)


@define_op("fp8_linear")
def fp8_linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """y[m, n] = (sum_k codes[m, k] * weight[n, k]) * scale[m] * weight_scale[n] + bias[n], then a cast.

    The sum is in fp32 here. GPUs keep fewer bits of it (about 13 of mantissa on Hopper), which K in the thousands of
    e4m3 products hides.

    codes: float8_e4m3fn [M, K]; scale: fp32 [M], both from `quant_token_fp8`
    weight: float8_e4m3fn [N, K], K contiguous; weight_scale: fp32 [N]
    bias: float [N] or None
    returns: out_dtype [M, N]
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(codes, scale, weight, weight_scale, bias, out_dtype)


@fp8_linear.register_fake
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias, out_dtype)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=out_dtype)


@fp8_linear.register_cuda
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias, out_dtype)
    return dispatch.run("fp8_linear", _reference, codes, scale, weight, weight_scale, bias, out_dtype)
