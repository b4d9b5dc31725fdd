"""Linear layers with block-scaled FP4 weights and activations (W4A4): MXFP4 or NVFP4 on both sides."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .block_scales import MX, NV, decode_blocks
from .int8_linear import check_vectors, unfit
from .op import define_op
from .quant_token import FLOATS

OP = "block_fp4_linear"


def _check(
    codes: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_block_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise unfit(OP, "codes torch.uint8 [M, K/2]", codes)
    m, k = codes.shape[0], 2 * codes.shape[1]
    bits = block_scale
    ok = bits.dtype == torch.uint8 and bits.dim() == 2 and bits.shape[0] == m
    fits = ok and k > 0 and any(bits.shape[1] * group == k for group in (MX, NV))
    if not fits:
        raise unfit(OP, f"block_scale torch.uint8 [{m}, K/{MX} or K/{NV}] for K={k}", bits)
    if scale.dtype != torch.float32 or scale.shape != (m,):
        raise unfit(OP, f"scale torch.float32 of shape ({m},)", scale)
    if out_dtype not in FLOATS:
        raise unfit(OP, "out_dtype float32, bfloat16 or float16", out_dtype)
    ok = weight.dtype == torch.uint8 and weight.dim() == 2 and weight.shape[1] == k // 2
    if not ok:
        raise unfit(OP, f"weight torch.uint8 [N, {k // 2}]", weight)
    shape = (weight.shape[0], bits.shape[1])
    ok = weight_block_scale.dtype == torch.uint8 and weight_block_scale.shape == shape
    if not ok:
        raise unfit(OP, f"weight_block_scale torch.uint8 of shape {shape}", weight_block_scale)
    check_vectors(OP, weight.shape[0], weight_scale, bias)


def _reference(
    codes: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_block_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(codes, block_scale, scale, weight, weight_block_scale, weight_scale, bias, out_dtype)
    y = F.linear(decode_blocks(codes, block_scale), decode_blocks(weight, weight_block_scale))
    y = y.mul_(scale.unsqueeze(1)).mul_(weight_scale)
    if bias is not None:
        y.add_(bias.float())
    return y.to(out_dtype)


@define_op("block_fp4_linear")
def block_fp4_linear(
    codes: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_block_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y[m, n] = (sum_k x[m, k] * w[n, k]) * scale[m] * weight_scale[n] + bias[n], accumulated in fp32, then a cast.

    x[m, k] = e(codes[m, k]) * b(block_scale[m, k // g]), and w of the weight's: e is E2M1, b is E8M0 for g = 32 (MXFP4)
    and E4M3 for g = 16 (NVFP4).

    codes: uint8 [M, K/2], even k in the low nibble; block_scale: uint8 [M, K/g]; scale: fp32 [M], all of
    `quant_token_block_fp4`
    weight: uint8 [N, K/2]; weight_block_scale: uint8 [N, K/g]; weight_scale: fp32 [N]
    bias: float [N] or None
    returns: out_dtype [M, N]
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(codes, block_scale, scale, weight, weight_block_scale, weight_scale, bias, out_dtype)


@block_fp4_linear.register_fake
def _(*args: Any) -> Tensor:
    _check(*args)
    codes, weight, out_dtype = args[0], args[3], args[-1]
    y: Tensor = codes.new_empty((codes.shape[0], weight.shape[0]), dtype=out_dtype)
    return y


@block_fp4_linear.register_cuda
def _(*args: Any) -> Tensor:
    _check(*args)
    found: Tensor = dispatch.run(OP, _reference, *args)
    return found
