"""The down-projection of a low-rank branch behind what makes its input: a modulated norm, or an activation."""

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .act_quant import ACTS, GATED, activated, token_width
from .int8_linear import check_float, unfit
from .norm_quant import Norm
from .op import define_op
from .quant_token import FLOATS

NORM, ACT = "norm_down", "act_down"


def _check(op: str, k: int, pre_scale: Tensor | None, down: Tensor) -> None:
    if k <= 0:
        raise unfit(op, "K > 0", f"K={k}")
    if pre_scale is not None:
        ok = pre_scale.dtype == torch.float32 and pre_scale.shape == (k,)
        if not ok:
            raise unfit(op, f"pre_scale torch.float32 of shape ({k},)", pre_scale)
    ok = down.dim() == 2 and down.shape[0] > 0 and down.shape[1] == k and down.dtype in FLOATS
    if not ok:
        raise unfit(op, f"a float down [R, {k}]", down)


def _project(y: Tensor, dtype: torch.dtype, pre_scale: Tensor | None, down: Tensor) -> Tensor:
    """y: fp32 [M, K] -> dtype [M, R]."""
    y = y if pre_scale is None else y * pre_scale
    return (y.to(dtype).float() @ down.to(dtype).float().t()).to(dtype)


def _norm_reference(x: Tensor, norm: Norm, pre_scale: Tensor | None, down: Tensor) -> Tensor:
    return _project(norm.apply(x), x.dtype, pre_scale, down)


def _act_reference(x: Tensor, act: str, pre_scale: Tensor | None, down: Tensor, prefix: Tensor | None) -> Tensor:
    wide = activated(x.float(), act)
    return _project(wide if prefix is None else torch.cat([prefix.float(), wide], dim=1), x.dtype, pre_scale, down)


NormArguments = tuple[Tensor, Norm, Tensor | None, Tensor]


def _parse_norm(
    x: Tensor,
    mod: list[Tensor],
    affine: list[Tensor],
    pre_scale: Tensor | None,
    down: Tensor,
    kind: str,
    eps: float,
) -> NormArguments:
    check_float(NORM, x)
    norm = Norm(mod, affine, kind, eps)
    norm.check(NORM, *x.shape)
    _check(NORM, x.shape[1], pre_scale, down)
    return x, norm, pre_scale, down


def _check_act(x: Tensor, act: str, pre_scale: Tensor | None, down: Tensor, prefix: Tensor | None) -> None:
    check_float(ACT, x)
    if act not in ACTS:
        raise unfit(ACT, f"act to be one of {', '.join(ACTS)}", repr(act))
    if act in GATED and x.shape[1] % 2 != 0:
        raise unfit(ACT, f"two halves for {act}", f"{x.shape[1]} columns")
    if prefix is not None:
        ok = prefix.dim() == 2 and prefix.dtype in FLOATS and len(prefix) == len(x)
        if not ok:
            raise unfit(ACT, f"a float prefix of shape ({len(x)}, P)", prefix)
    _check(ACT, token_width(x, act, prefix), pre_scale, down)


@define_op(NORM)
def norm_down(
    x: Tensor,
    mod: list[Tensor],
    affine: list[Tensor],
    pre_scale: Tensor | None,
    down: Tensor,
    kind: str,
    eps: float,
) -> Tensor:
    """low[m, r] = sum_k y[m, k] * pre_scale[k] * down[r, k]: the input of `norm_quant`'s rotation through the
    down-projection of a low-rank branch (SVDQuant, Li et al. 2024), without that input in memory.

    y = norm(x), modulated, as `norm_quant` defines it, in fp32; y * pre_scale is rounded to x's dtype, in which it is
    multiplied with sums in fp32.

    x: fp32 | bf16 | fp16 [M, K]; any row stride
    mod: [] or [shift, scale], float [B, K] with any row strides; B divides M
    affine: [], [weight] or [weight, bias], float [K]
    pre_scale: fp32 [K] or None
    down: float [R, K], read as x's dtype
    kind: "layer" or "rms"
    returns: x.dtype [M, R]; on GPUs a row does not depend on the other rows of its batch
    Raises ValueError when a shape, dtype or kind does not fit.
    """
    return _norm_reference(*_parse_norm(x, mod, affine, pre_scale, down, kind, eps))


@norm_down.register_fake
def _(*args: Any) -> Tensor:
    x, *_, down = _parse_norm(*args)
    return x.new_empty((x.shape[0], down.shape[0]))


@norm_down.register_cuda
def _(*args: Any) -> Tensor:
    found: Tensor = dispatch.run(NORM, _norm_reference, *_parse_norm(*args))
    return found


@define_op(ACT)
def act_down(x: Tensor, act: str, pre_scale: Tensor | None, down: Tensor, prefix: Tensor | None = None) -> Tensor:
    """As `norm_down`, with y = [prefix | act(x)] as `act_quant` defines it.

    x: fp32 | bf16 | fp16 [M, N], any row stride; [M, 2N] for swiglu and geglu
    act: none, gelu, gelu_tanh, silu, swiglu or geglu
    pre_scale: fp32 [K] or None
    down: float [R, K], read as x's dtype
    prefix: fp32 | bf16 | fp16 [M, P], any row stride: columns that come first, as they are; K = P + N
    returns: x.dtype [M, R]; on GPUs a row does not depend on the other rows of its batch
    Raises ValueError when a shape, dtype or act does not fit.
    """
    _check_act(x, act, pre_scale, down, prefix)
    return _act_reference(x, act, pre_scale, down, prefix)


@act_down.register_fake
def _(x: Tensor, act: str, pre_scale: Tensor | None, down: Tensor, prefix: Tensor | None = None) -> Tensor:
    _check_act(x, act, pre_scale, down, prefix)
    return x.new_empty((x.shape[0], down.shape[0]))


@act_down.register_cuda
def _(x: Tensor, act: str, pre_scale: Tensor | None, down: Tensor, prefix: Tensor | None = None) -> Tensor:
    _check_act(x, act, pre_scale, down, prefix)
    found: Tensor = dispatch.run(ACT, _act_reference, x, act, pre_scale, down, prefix)
    return found
