"""Scaled dot-product attention on the layout that projections give and take, with the back-end that is fastest here."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""torch prefers FlashAttention-2 even on Hopper, where cuDNN's kernels are faster."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v.

    q: float [B, T, H, d]; k, v: [B, S, H, d]; strided views with contiguous d are fine
    mask: additive, broadcastable to [B, H, T, S], or None
    returns: [B * T, H * d]
    """
    b, t, h, d = q.shape
    heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    if q.device.type == "cuda":
        with sdpa_kernel(_ORDER, set_priority=True):
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    else:
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    return out.transpose(1, 2).reshape(b * t, h * d)
