"""The activation function of a feed-forward network (or none) and the quantisation of what a layer reads, in one op."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .int8_linear import check_float, unfit
from .op import define_op
from .quant_token import FLOATS
from .transform import Transform, make_transform


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": _tanh_gelu,
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}
"""Name -> what acts on x or, for the gated ones, on the gate."""

GATED = ("swiglu", "geglu")


Parsed = tuple[str, Transform, Tensor | None]


def activated(x: Tensor, act: str) -> Tensor:
    """act(x) in x's dtype; gated: [M, 2N] -> [M, N]."""
    if act not in GATED:
        return ACTS[act](x)
    hidden, gate = x.chunk(2, dim=1)
    return hidden * ACTS[act](gate)


def _reference(x: Tensor, act: str, transform: Transform, prefix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    wide = activated(x.float(), act)
    return transform.quantize(wide if prefix is None else torch.cat([prefix.float(), wide], dim=1))


def _parse(
    x: Tensor,
    act: str,
    pre_scale: Tensor | None,
    signs: Tensor | None,
    block_size: int,
    hadamard_kind: str,
    out: str = "int8",
    prefix: Tensor | None = None,
) -> Parsed:
    check_float("act_quant", x)
    if act not in ACTS:
        raise unfit("act_quant", f"act to be one of {', '.join(ACTS)}", repr(act))
    if act in GATED and x.shape[1] % 2 != 0:
        raise unfit("act_quant", f"two halves for {act}", f"{x.shape[1]} columns")
    if prefix is not None:
        ok = prefix.dim() == 2 and prefix.dtype in FLOATS and len(prefix) == len(x)
        if not ok:
            raise unfit("act_quant", f"a float prefix of shape ({len(x)}, P)", prefix)
    transform = make_transform("act_quant", pre_scale, signs, block_size, hadamard_kind, out)
    transform.check("act_quant", token_width(x, act, prefix))
    return act, transform, prefix


def token_width(x: Tensor, act: str, prefix: Tensor | None) -> int:
    """K: columns of the prefix and of act(x)."""
    width = x.shape[1] // 2 if act in GATED else x.shape[1]
    return width if prefix is None else width + prefix.shape[1]


@define_op("act_quant")
def act_quant(
    x: Tensor,
    act: str,
    pre_scale: Tensor | None,
    signs: Tensor | None,
    block_size: int,
    hadamard_kind: str,
    out: str = "int8",
    prefix: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of T([prefix | act(x)]), as `quant_token` or, for FP4, `quant_token_fp4` defines them.

    T(y) = (y * pre_scale * signs)[m, block] @ H / sqrt(block_size) for every block of channels, see `hadamard`. All of
    it is fp32: nothing is rounded to x's dtype between x and the codes. On GPUs, what goes into the product with H is
    rounded once more (`norm_quant` says how), and where that is to bf16, gelu_tanh has its tanh to 2**-11.

    x: fp32 | bf16 | fp16 [M, N], any row stride; [M, 2N] for swiglu and geglu, where y = x[:, :N] * act(x[:, N:])
    act: none, gelu (erf), gelu_tanh, silu, swiglu (SiLU of the gate) or geglu (erf GELU of the gate)
    pre_scale: fp32 [K] or None
    signs: int8 [K] of +-1, or None
    block_size: 0 for no rotation; hadamard_kind: "sylvester" or "regular"
    out: int8; fp8 for float8_e4m3fn codes and scale[m] = amax[m] / 448; fp4 for E2M1 elements as int8 codes, fp4g16,
        fp4g32, fp4g64 or fp4g128 for such with a scale for each group
    prefix: fp32 | bf16 | fp16 [M, P], any row stride: columns that come first, as they are; K = P + N
    returns codes: int8 | float8_e4m3fn [M, K]; scale: fp32 [M]
    Raises ValueError when a shape, dtype, size, act or kind does not fit.
    """
    return _reference(x, *_parse(x, act, pre_scale, signs, block_size, hadamard_kind, out, prefix))


@act_quant.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    act, transform, prefix = _parse(x, *args)
    return transform.empty(x, token_width(x, act, prefix))


@act_quant.register_cuda
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = dispatch.run("act_quant", _reference, x, *_parse(x, *args))
    return found
