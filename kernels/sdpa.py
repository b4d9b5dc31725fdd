"""`attention` by torch's `scaled_dot_product_attention`, with the back-end that is fastest on this GPU first.

torch prefers FlashAttention-2 even on Hopper, where cuDNN's kernels are faster. Those are made for thousands of keys;
with few, and above all with heads of 72 channels, which they pad to 128, Triton's is the faster (`docs/benchmarks.md`).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .dispatch import triton_version

FEW = 512
"""Most keys for which Triton's kernel is preferred."""

_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@cache
def _prefers_triton(device: torch.device) -> bool:
    """Whether the kernel for few keys was measured to be faster on such a GPU: Hopper."""
    if triton_version() is None or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def limits(
    op: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int = 72,
    keys: int | None = None,
    **_: Any,
) -> str | None:
    """Why Triton is preferred for such an input; None where torch is."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and 16 <= head_dim <= 128
    if fits and keys is not None and keys <= FEW and _prefers_triton(device):
        return f"{keys} keys are few"
    return None


def supports(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """`limits` of these tensors."""
    if mask is not None and mask.shape[1:3] != (1, 1):
        return None
    return limits(op, q.device, q.dtype, q.shape[3], k.shape[1])


def run(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` by torch."""
    b, t, h, d = q.shape
    mask = None if mask is None else mask.to(q.dtype)
    with sdpa_kernel(_ORDER, set_priority=True):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return out.transpose(1, 2).reshape(b * t, h * d)
