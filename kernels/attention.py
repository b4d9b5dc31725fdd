"""Softmax attention without mask or dropout, from strided views to the layout that the output projection reads."""

from torch import Tensor
from torch.nn import functional as F

from . import dispatch
from .int8_linear import expect
from .op import define_op
from .quant_token import FLOATS


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    expect(q.dim() == 4 and q.dtype in FLOATS, "attention", "q float32, bfloat16 or float16 [B, T, H, hd]", q)
    batch, _, heads, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        ok = x.dim() == 4 and x.dtype == q.dtype and (x.shape[0], *x.shape[2:]) == (batch, heads, head_dim)
        expect(ok, "attention", f"{name} {q.dtype} [{batch}, S, {heads}, {head_dim}]", x)
    expect(k.shape[1] == v.shape[1] > 0, "attention", "as many values as keys, and at least one", v.shape[1])
    expect(scale > 0, "attention", "a positive scale", scale)


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _check(q, k, v, scale)
    wide_q, wide_k, wide_v = (x.float().transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=scale)
    return y.transpose(1, 2).flatten(2).contiguous().to(q.dtype)


@define_op("attention")
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """y[b, t, h] = sum_s softmax_s(scale * q[b, t, h] . k[b, s, h]) v[b, s, h], the heads side by side.

    q: fp32 | bf16 | fp16 [B, T, H, hd]; any strides, as of a slice of a merged projection's output
    k, v: q.dtype [B, S, H, hd]; any strides
    scale: > 0, as a rule hd ** -0.5
    returns: q.dtype [B, T, H * hd], contiguous
    Raises ValueError when a shape or dtype does not fit or the scale is not positive.
    """
    return _reference(q, k, v, scale)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _check(q, k, v, scale)
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))


@attention.register_cuda
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _check(q, k, v, scale)
    return dispatch.run("attention", _reference, q, k, v, scale)
