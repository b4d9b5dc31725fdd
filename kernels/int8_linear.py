"""Linear layers with int8 weights: int8 activations (W8A8) or float activations (W8A16)."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .op import define_op
from .quant_token import FLOATS

CHUNK = 1024
"""1024 * 128 * 128 = 2**24: within one chunk of K a float32 matmul of int8 codes is exact, also under TF32."""


def unfit(op: str, expected: str, found: object) -> ValueError:
    """The error that names the op, what it needs and what it got: made where it is raised, for checks run before every
    launch."""
    return ValueError(f"{op}: expected {expected}, found {describe(found) if isinstance(found, Tensor) else found}")


def describe(tensor: Tensor) -> str:
    """dtype and shape of a tensor, for an error message."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def check_vectors(op: str, n: int, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Check the per-row weight scale and the optional bias of a linear op with `n` outputs."""
    ok = weight_scale.dtype == torch.float32 and weight_scale.shape == (n,)
    if not ok:
        raise unfit(op, f"weight_scale torch.float32 of shape ({n},)", weight_scale)
    if bias is not None and (bias.shape != (n,) or bias.dtype not in FLOATS):
        raise unfit(op, f"a float bias of shape ({n},)", bias)


def check_codes(op: str, codes: Tensor, scale: Tensor, out_dtype: torch.dtype) -> None:
    """Check int8 activations and their per-token scale."""
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise unfit(op, "codes torch.int8 [M, K]", codes)
    ok = scale.dtype == torch.float32 and scale.shape == (codes.shape[0],)
    if not ok:
        raise unfit(op, f"scale torch.float32 of shape ({codes.shape[0]},)", scale)
    if out_dtype not in FLOATS:
        raise unfit(op, "out_dtype float32, bfloat16 or float16", out_dtype)


def check_float(op: str, x: Tensor) -> None:
    """Check float activations."""
    if x.dtype not in FLOATS or x.dim() != 2:
        raise unfit(op, "x float32, bfloat16 or float16 [M, K]", x)


def check_int8_weight(op: str, k: int, weight: Tensor) -> None:
    """Check an int8 weight for activations of width `k`."""
    ok = weight.dtype == torch.int8 and weight.dim() == 2 and weight.shape[1] == k
    if not ok:
        raise unfit(op, f"weight torch.int8 [N, {k}]", weight)


@cache
def _cpu_int_mm_is_exact() -> bool:
    # On CPUs without int8 dot-product instructions some libraries saturate pairs of products to 16 bits.
    codes = torch.full((33, 64), 127, dtype=torch.int8, device="cpu")
    low = torch.full((16, 64), -128, dtype=torch.int8, device="cpu")
    try:
        return all(
            bool((torch._int_mm(codes[:m], w.t()) == 64 * 127 * int(w[0, 0])).all())
            for m in (1, 33)
            for w in (codes[:16], low)
        )
    except RuntimeError:
        return False


def int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """acc[m, n] = sum_k codes[m, k] * weight[n, k], exact, on any device and whatever the batch.

    codes: int8 [M, K]; weight: int8 [N, K]; returns int32 [M, N] (fp32 with integer values when K <= 1024)
    """
    if codes.device.type == "cpu" and codes.numel() and _cpu_int_mm_is_exact():
        return torch._int_mm(codes.contiguous(), weight.contiguous().t())
    k = codes.shape[1]
    acc = F.linear(codes[:, :CHUNK].float(), weight[:, :CHUNK].float())
    if k <= CHUNK:
        return acc
    acc = acc.to(torch.int32)
    for start in range(CHUNK, k, CHUNK):
        part = F.linear(codes[:, start : start + CHUNK].float(), weight[:, start : start + CHUNK].float())
        acc += part.to(torch.int32)
    return acc


def scaled_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The unchecked body of `int8_linear`, shared with the int4 ops that decode to int8 first."""
    y = int_matmul(codes, weight).float().mul_(scale.unsqueeze(1)).mul_(weight_scale)
    if bias is not None:
        y.add_(bias.float())
    return y.to(out_dtype)


def weight_only_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The unchecked body of `int8_weight_linear`, shared with the int4 op that decodes to int8 first."""
    # Before its scale the product of codes can pass the largest fp16 (65504); bf16 and fp32 have the range.
    wide = x.float() if x.dtype == torch.float16 else x
    y = F.linear(wide, weight.to(wide.dtype)).float().mul_(weight_scale)
    if bias is not None:
        y.add_(bias.float())
    return y.to(x.dtype)


def _check_int8(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    check_codes("int8_linear", codes, scale, out_dtype)
    check_int8_weight("int8_linear", codes.shape[1], weight)
    check_vectors("int8_linear", weight.shape[0], weight_scale, bias)


def _reference(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check_int8(codes, scale, weight, weight_scale, bias, out_dtype)
    return scaled_matmul(codes, scale, weight, weight_scale, bias, out_dtype)


@define_op("int8_linear")
def int8_linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """y[m, n] = (sum_k codes[m, k] * weight[n, k]) * scale[m] * weight_scale[n] + bias[n], the sum exact, then a cast.

    codes: int8 [M, K]; scale: fp32 [M], both from `quant_token`
    weight: int8 [N, K], K contiguous; weight_scale: fp32 [N]
    bias: float [N] or None
    returns: out_dtype [M, N]; a row does not depend on the other rows of its batch
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(codes, scale, weight, weight_scale, bias, out_dtype)


@int8_linear.register_fake
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check_int8(codes, scale, weight, weight_scale, bias, out_dtype)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=out_dtype)


@int8_linear.register_cuda
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check_int8(codes, scale, weight, weight_scale, bias, out_dtype)
    return dispatch.run("int8_linear", _reference, codes, scale, weight, weight_scale, bias, out_dtype)


def _check_weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    check_float("int8_weight_linear", x)
    check_int8_weight("int8_weight_linear", x.shape[1], weight)
    check_vectors("int8_weight_linear", weight.shape[0], weight_scale, bias)


def _weight_only_reference(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_weight_only(x, weight, weight_scale, bias)
    return weight_only_matmul(x, weight, weight_scale, bias)


@define_op("int8_weight_linear")
def int8_weight_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y[m, n] = (sum_k x[m, k] * weight[n, k]) * weight_scale[n] + bias[n], accumulated in fp32.

    x: fp32 | bf16 | fp16 [M, K]
    weight: int8 [N, K], K contiguous; weight_scale: fp32 [N]
    bias: float [N] or None
    returns: x.dtype [M, N]
    Raises ValueError when a shape or dtype does not fit.
    """
    return _weight_only_reference(x, weight, weight_scale, bias)


@int8_weight_linear.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_weight_only(x, weight, weight_scale, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


@int8_weight_linear.register_cuda
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_weight_only(x, weight, weight_scale, bias)
    return dispatch.run("int8_weight_linear", _weight_only_reference, x, weight, weight_scale, bias)
