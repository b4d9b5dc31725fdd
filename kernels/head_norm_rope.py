"""From merged q/k/v projections to attention's inputs: norms, rotary embedding and joining of two streams."""

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .int8_linear import unfit
from .op import define_op
from .quant_token import FLOATS

OP = "head_norm_rope"


def _check_stream(name: str, qkv: Tensor, weights: list[Tensor], heads: int) -> None:
    ok = qkv.dim() == 3 and qkv.dtype in FLOATS and qkv.shape[2] > 0 and qkv.shape[2] % (6 * heads) == 0
    if not ok:
        raise unfit(OP, f"{name} float32, bfloat16 or float16 [B, T, 3 * {heads} * hd] with an even hd", qkv)
    width = qkv.shape[2] // 3
    ok = len(weights) in (0, 2, 4)
    if not ok:
        raise unfit(OP, f"no norm weights of {name}, or those of q and k, and their biases or none", len(weights))
    for weight in weights:
        ok = (
            weight.dtype in FLOATS
            and weight.shape in ((width // heads,), (width,))
            and weight.shape == weights[0].shape
        )
        if not ok:
            raise unfit(OP, f"norm weights of {name} [{width // heads}] (per head) or [{width}] (all heads)", weight)


def _check(
    qkv: Tensor,
    weights: list[Tensor],
    other: Tensor | None,
    other_weights: list[Tensor],
    rope: list[Tensor],
    heads: int,
) -> None:
    if heads <= 0:
        raise unfit(OP, "heads > 0", heads)
    _check_stream("qkv", qkv, weights, heads)
    tokens = qkv.shape[1]
    if other is not None:
        _check_stream("other", other, other_weights, heads)
        same = (other.dtype, other.shape[0], other.shape[2]) == (qkv.dtype, qkv.shape[0], qkv.shape[2])
        if not same:
            raise unfit(OP, f"other {qkv.dtype} [{qkv.shape[0]}, T, {qkv.shape[2]}]", other)
        tokens += other.shape[1]
    if len(rope) not in (0, 2):
        raise unfit(OP, "no rope, or its cosines and sines", len(rope))
    for table in rope:
        ok = table.dtype == torch.float32 and table.shape == (tokens, qkv.shape[2] // (3 * heads))
        if not ok:
            raise unfit(OP, f"rope torch.float32 of shape ({tokens}, {qkv.shape[2] // (3 * heads)})", table)


def _normed(part: Tensor, affine: list[Tensor], eps: float) -> Tensor:
    """RMSNorm, with a bias LayerNorm, of [B, T, H, hd] over the last axis, or over the last two for H * hd weights."""
    rows = part.flatten(2) if affine[0].shape[0] > part.shape[3] else part
    if len(affine) > 1:
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * affine[0].float()
    return (rows + affine[1].float() if len(affine) > 1 else rows).view(part.shape)


def _stream(qkv: Tensor, weights: list[Tensor], heads: int, eps: float) -> Tensor:
    q, k, v = qkv.float().unflatten(2, (3, heads, -1)).unbind(2)
    if weights:
        q, k = _normed(q, weights[::2], eps), _normed(k, weights[1::2], eps)
    return torch.stack([q, k, v])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([-odd, even], -1).flatten(-2)
    return x * cos[:, None] + swapped * sin[:, None]


def _reference(
    qkv: Tensor,
    weights: list[Tensor],
    other: Tensor | None,
    other_weights: list[Tensor],
    rope: list[Tensor],
    heads: int,
    eps: float,
) -> Tensor:
    _check(qkv, weights, other, other_weights, rope, heads)
    out = _stream(qkv, weights, heads, eps)
    if other is not None:
        out = torch.cat([out, _stream(other, other_weights, heads, eps)], 2)
    if rope:
        out = torch.cat([_rotated(out[:2], *rope), out[2:]])
    return out.to(qkv.dtype)


@define_op(OP)
def head_norm_rope(
    qkv: Tensor,
    weights: list[Tensor],
    other: Tensor | None,
    other_weights: list[Tensor],
    rope: list[Tensor],
    heads: int,
    eps: float,
) -> Tensor:
    """out = [rope(norm(q)), rope(norm(k)), v] of the tokens of `qkv` followed by those of `other`, rounded once.

    norm(x) = x / sqrt(mean(x^2) + eps) * weight, over each head or over all of them, as long as the weight is; with
    biases norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.
    rope(x)[2i] = x[2i] cos[2i] - x[2i+1] sin[2i], rope(x)[2i+1] = x[2i+1] cos[2i+1] + x[2i] sin[2i+1]
    (Su et al. 2021, arXiv 2104.09864, neighbouring channels paired).

    qkv: fp32 | bf16 | fp16 [B, T1, 3 * H * hd], q before k before v; the rows may be those of a wider tensor
    weights: [] for no norm, or those of q and k, and their biases if they have any: float [hd] each (norm per head), or
        float [H * hd] each (one norm over all heads)
    other: qkv.dtype [B, T2, 3 * H * hd] or None, and its own norm weights; FLUX has the text first, SD3 the image
    rope: [] for none, or [cos, sin], fp32 [T1 + T2, hd]
    returns: qkv.dtype [3, B, T1 + T2, H, hd], contiguous: `q, k, v = out`
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(qkv, weights, other, other_weights, rope, heads, eps)


@head_norm_rope.register_fake
def _(
    qkv: Tensor,
    weights: list[Tensor],
    other: Tensor | None,
    other_weights: list[Tensor],
    rope: list[Tensor],
    heads: int,
    eps: float,
) -> Tensor:
    _check(qkv, weights, other, other_weights, rope, heads)
    tokens = qkv.shape[1] + (0 if other is None else other.shape[1])
    return qkv.new_empty((3, qkv.shape[0], tokens, heads, qkv.shape[2] // (3 * heads)))


@head_norm_rope.register_cuda
def _(*args: Any) -> Tensor:
    _check(*args[:-1])  # all but eps
    found: Tensor = dispatch.run(OP, _reference, *args)
    return found
