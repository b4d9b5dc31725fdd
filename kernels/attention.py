"""Attention on the layout that projections give and take."""

from torch import Tensor
from torch.nn import functional as F

from . import dispatch
from .int8_linear import unfit
from .op import define_op
from .quant_token import FLOATS

OP = "attention"


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    ok = q.dim() == 4 and q.dtype in FLOATS and q.shape[3] > 0
    if not ok:
        raise unfit(OP, "q float32, bfloat16 or float16 [B, T, H, d]", q)
    b, t, h, d = q.shape
    for name, tensor in (("k", k), ("v", v)):
        ok = tensor.dim() == 4 and tensor.dtype == q.dtype and tensor.shape[1] == k.shape[1] > 0
        ok = ok and (tensor.shape[0], *tensor.shape[2:]) == (b, h, d)
        if not ok:
            raise unfit(OP, f"{name} {q.dtype} [{b}, S, {h}, {d}] with S > 0", tensor)
    if mask is not None:
        ok = mask.dim() == 4 and mask.dtype in FLOATS
        ok = ok and all(size in (1, full) for size, full in zip(mask.shape, (b, h, t, k.shape[1]), strict=True))
        if not ok:
            raise unfit(OP, f"mask float, broadcastable to [{b}, {h}, {t}, {k.shape[1]}], or None", mask)


def by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` without its checks, by the back-end that torch prefers."""
    if mask is not None:  # of which torch wants the keys side by side
        mask = mask.to(q.dtype).expand(*mask.shape[:3], k.shape[1]).contiguous()
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return out.transpose(1, 2).reshape(q.shape[0] * q.shape[1], -1)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    _check(q, k, v, mask)
    return by_torch(q, k, v, mask)


@define_op(OP)
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """out = softmax(q k^T / sqrt(d) + mask) v for every head (Dao et al. 2022, arXiv 2205.14135).

    q: fp32 | bf16 | fp16 [B, T, H, d]; k, v: q.dtype [B, S, H, d]; strided views are fine where d is contiguous
    mask: float, 4 dimensions, broadcastable to [B, H, T, S], added to the scores; or None
    returns: q.dtype [B * T, H * d], contiguous
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(q, k, v, mask)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    _check(q, k, v, mask)
    return q.new_empty((q.shape[0] * q.shape[1], q.shape[2] * q.shape[3]))


@attend.register_cuda
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    _check(q, k, v, mask)
    found: Tensor = dispatch.run(OP, _reference, q, k, v, mask)
    return found
