"""`fp8_linear` through `torch._scaled_mm`, that is cuBLASLt with one scale per row of each operand."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .dispatch import Refusal
from .fp8_linear import lacks_fp8

MULTIPLE = 16
"""cuBLASLt wants rows of both operands to start at multiples of 16 bytes."""


@cache
def _device_reason(device: torch.device) -> str | None:
    """Why row-wise scales do not work here: asked of the library itself, whose support depends on its version."""
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if (reason := lacks_fp8(device)) is not None:
        return reason
    codes = torch.zeros(32, 32, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.ones(32, device=device)
    try:
        _multiply(codes, scale, codes, scale, scale.to(torch.bfloat16))
    except (RuntimeError, AttributeError) as error:
        return f"torch._scaled_mm: {str(error).strip().splitlines()[0]}"
    return None


def _multiply(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scale.unsqueeze(1),
        scale_b=weight_scale.unsqueeze(0),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def limits(op: str, device: torch.device, out_dtype: torch.dtype | None = None, **facts: Any) -> str | None:
    """Why cuBLASLt cannot take such an input; None when it can. `facts`: `k`, `n`."""
    if out_dtype is not None and out_dtype != torch.bfloat16:
        return f"the output is {out_dtype}, not bfloat16"
    for name in ("k", "n"):
        if facts.get(name) is not None and facts[name] % MULTIPLE:
            return f"{name.upper()}={facts[name]} is not a multiple of {MULTIPLE}"
    return _device_reason(device)


def supports(
    op: str, codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Any, out_dtype: torch.dtype
) -> str | None:
    """`limits` of these tensors."""
    if codes.shape[0] == 0:
        return "no tokens"
    return limits(op, codes.device, out_dtype, k=codes.shape[1], n=weight.shape[0])


def run(
    op: str,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`fp8_linear` by cuBLASLt. Raises Refusal for a shape that it has no algorithm for: few tokens of many channels
    (1 or 17 of K = 15360)."""
    bias = None if bias is None else bias.to(torch.bfloat16)
    try:
        return _multiply(codes.contiguous(), scale.contiguous(), weight.contiguous(), weight_scale.contiguous(), bias)
    except RuntimeError as error:
        if "CUBLAS_STATUS_NOT_SUPPORTED" not in str(error):
            raise
        raise Refusal("cuBLASLt has no algorithm for this shape") from None
