"""`attention` by torch's `scaled_dot_product_attention`, with the back-end that is fastest on this GPU first.

torch prefers FlashAttention-2 even on Hopper, where cuDNN's kernels are faster. Where the kernels here are faster
still, which was measured on Hopper alone, Triton is left the call: see `faster` in `_triton/attention.py`.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import dispatch
from .attention import by_torch

_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def limits(op: str, device: torch.device, **_: Any) -> str | None:
    """Why torch cannot take such an input: it takes every one."""
    return None


def supports(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why Triton is left these tensors; None where it is not."""
    if q.dtype == torch.float32 or not _is_hopper(q.device):
        return None
    if (reason := dispatch.blocker(op, q.device)) is not None:
        dispatch.remember(op, reason, "%s runs without its Triton kernel on %s: %s", op, q.device, reason)
        return None
    return "measured to be slower" if dispatch.twin(op).faster(q, k, v, mask) else None


@cache
def _is_hopper(device: torch.device) -> bool:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def run(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` by torch."""
    with sdpa_kernel(_ORDER, set_priority=True):
        return by_torch(q, k, v, mask)
