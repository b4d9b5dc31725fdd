"""The activation function of a feed-forward network (or none) and the quantisation of what a layer reads, in one op."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .int8_linear import check_float, expect
from .op import define_op
from .transform import CODE_DTYPES, Transform


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


def _reference(x: Tensor, act: str, transform: Transform) -> tuple[Tensor, Tensor]:
    wide = x.float()
    if act not in GATED:
        return transform.quantize(ACTS[act](wide))
    hidden, gate = wide.chunk(2, dim=1)
    return transform.quantize(hidden * ACTS[act](gate))


def _parse(
    x: Tensor, act: str, pre_scale: Tensor | None, signs: Tensor | None, block_size: int, hadamard_kind: str, out: str
) -> tuple[str, Transform]:
    check_float("act_quant", x)
    expect(act in ACTS, "act_quant", f"act to be one of {', '.join(ACTS)}", repr(act))
    expect(out in CODE_DTYPES, "act_quant", f"out to be one of {', '.join(CODE_DTYPES)}", repr(out))
    expect(act not in GATED or x.shape[1] % 2 == 0, "act_quant", f"two halves for {act}", f"{x.shape[1]} columns")
    transform = Transform(pre_scale, signs, block_size, hadamard_kind, CODE_DTYPES[out])
    transform.check("act_quant", _width(x, act))
    return act, transform


def _width(x: Tensor, act: str) -> int:
    return x.shape[1] // 2 if act in GATED else x.shape[1]


@define_op("act_quant")
def act_quant(
    x: Tensor,
    act: str,
    pre_scale: Tensor | None,
    signs: Tensor | None,
    block_size: int,
    hadamard_kind: str,
    out: str = "int8",
) -> tuple[Tensor, Tensor]:
    """Codes and scales of T(act(x)), as `quant_token` defines them.

    T(y) = (y * pre_scale * signs)[m, block] @ H / sqrt(block_size) for every block of channels, see `hadamard`. All of
    it is fp32: nothing is rounded to x's dtype between x and the codes. The Triton twin rounds once, on the way into
    the product with H: to fp16, after a power of two per row that keeps it in range.

    x: fp32 | bf16 | fp16 [M, K], any row stride; [M, 2K] for swiglu and geglu, where y = x[:, :K] * act(x[:, K:])
    act: none, gelu (erf), gelu_tanh, silu, swiglu (SiLU of the gate) or geglu (erf GELU of the gate)
    pre_scale: fp32 [K] or None
    signs: int8 [K] of +-1, or None
    block_size: 0 for no rotation; hadamard_kind: "sylvester" or "regular"
    out: int8, or fp8 for float8_e4m3fn codes and scale[m] = amax[m] / 448
    returns codes: int8 | float8_e4m3fn [M, K]; scale: fp32 [M]
    Raises ValueError when a shape, dtype, size, act or kind does not fit.
    """
    return _reference(x, *_parse(x, act, pre_scale, signs, block_size, hadamard_kind, out))


@act_quant.register_fake
def _(
    x: Tensor,
    act: str,
    pre_scale: Tensor | None,
    signs: Tensor | None,
    block_size: int,
    hadamard_kind: str,
    out: str = "int8",
) -> tuple[Tensor, Tensor]:
    _, transform = _parse(x, act, pre_scale, signs, block_size, hadamard_kind, out)
    return transform.empty(x, _width(x, act))


@act_quant.register_cuda
def _(
    x: Tensor,
    act: str,
    pre_scale: Tensor | None,
    signs: Tensor | None,
    block_size: int,
    hadamard_kind: str,
    out: str = "int8",
) -> tuple[Tensor, Tensor]:
    parsed = _parse(x, act, pre_scale, signs, block_size, hadamard_kind, out)
    found: tuple[Tensor, Tensor] = dispatch.run("act_quant", _reference, x, *parsed)
    return found
