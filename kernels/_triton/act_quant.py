"""Triton twin of `act_quant`: every token is read once and stays in registers."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..act_quant import activated, token_width
from ..transform import Transform
from .rows import (
    GLUON,
    gluon_for,
    hadamard_operand,
    limits,
    load_hadamard,
    load_tile,
    note,
    programs,
    quantize_tokens,
    readable,
    row_stride,
    tile_options,
    transform_tile,
    unsupported,
)
from .tiles import await_inputs, overlap

__all__ = ["limits", "note", "run", "supports"]


@triton.jit
def sigmoid_of_log2(t):
    """1 / (1 + 2**-t): as a squared reciprocal root, it is two fast instructions; a division is eight."""
    root = tl.rsqrt(1.0 + tl.exp2(-t))
    return root * root


@triton.jit
def activate(x, ACT: tl.constexpr):
    """gelu(x) = x/2 (1 + erf(x / sqrt 2)); its tanh form is x sigmoid(2 sqrt(2/pi) (x + 0.044715 x**3))."""
    if ACT == "gelu_tanh":
        # 2.3022... = 2 sqrt(2/pi) log2(e), 0.10294... = 0.044715 of it.
        x = x * sigmoid_of_log2(x * (2.302208198 + 0.1029432395 * (x * x)))
    elif ACT == "silu" or ACT == "swiglu":
        x = x * sigmoid_of_log2(x * 1.442695041)
    elif ACT == "gelu" or ACT == "geglu":
        half = 0.5 * x
        x = half + half * tl.erf(x * 0.7071067812)
    return x


@triton.jit
def act_tile(
    x_ptr, at, HALF, ACT: tl.constexpr, FROM: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """act(x), or x * act(gate) where the gate is HALF (of x's elements) further."""
    x = load_tile(x_ptr, at, FROM, R, C, W, K)
    if ACT == "swiglu" or ACT == "geglu":
        x = x * activate(load_tile(x_ptr, at + HALF, FROM, R, C, W, K), ACT)
    else:
        x = activate(x, ACT)
    return x


@triton.jit(do_not_specialize=["M"])
def act_quant_kernel(
    x_ptr, pre_scale_ptr, signs_ptr, hadamard_ptr, pairs_ptr, scale_ptr, x_stride, HALF, M,
    ACT: tl.constexpr, HAS_PRE_SCALE: tl.constexpr, HAS_SIGNS: tl.constexpr, INT8: tl.constexpr,
    FP4: tl.constexpr, TINY: tl.constexpr, DOT: tl.constexpr, SIZE: tl.constexpr, MIN_ROWS: tl.constexpr,
    FLAT: tl.constexpr, K: tl.constexpr, W: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """R tokens at a time."""
    await_inputs()
    TWO: tl.constexpr = REST > 0
    h = load_hadamard(hadamard_ptr, SIZE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, R), tl.num_programs(0)):
        row = tile * R + tl.arange(0, R)
        live = row < M
        # Rows beyond the edge repeat the last one: their results are never stored, and the loads need no row mask.
        row = tl.minimum(row, M - 1)
        zero = row.to(tl.int64)[:, None, None] * 0
        at = row.to(tl.int64)[:, None, None] * x_stride
        y1 = act_tile(x_ptr, at, HALF, ACT, 0, R, FIRST, W, K)
        y1 = transform_tile(y1, pre_scale_ptr, signs_ptr, zero, 0, HAS_PRE_SCALE, HAS_SIGNS, K)
        y2 = y1
        if TWO:
            y2 = act_tile(x_ptr, at, HALF, ACT, FIRST, R, REST, W, K)
            y2 = transform_tile(y2, pre_scale_ptr, signs_ptr, zero, FIRST, HAS_PRE_SCALE, HAS_SIGNS, K)
        quantize_tokens(
            y1, y2, h, pairs_ptr, scale_ptr, row, live,
            INT8, FP4, TINY, DOT, SIZE, MIN_ROWS, K, FIRST, TWO, FLAT,
        )  # fmt: skip


def supports(op: str, x: Tensor, act: str, transform: Transform, prefix: Tensor | None = None) -> str | None:
    """`limits` of these tensors."""
    return unsupported(op, x, token_width(x, act, prefix), transform)


def run(op: str, x: Tensor, act: str, transform: Transform, prefix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`act_quant` by Triton."""
    k = token_width(x, act, prefix)
    gluon = gluon_for(x, k, 0 if prefix is None else prefix.shape[1], transform)
    if gluon is not None:
        try:
            return gluon.run_act(x, act, transform, prefix, k)
        except Exception as error:
            GLUON.leave(x.device, error)
    if prefix is not None:
        # Beside a prefix the activation has a pass of its own; fp32, so that the codes are the same.
        x, act = torch.cat([prefix.float(), activated(x.float(), act)], dim=1), "none"
    m = x.shape[0]
    codes, scale = transform.empty(x, k)
    if m == 0:
        return codes, scale
    options, rows = tile_options(k, transform), readable(x)
    act_quant_kernel[programs(m, options, x.device)](
        rows,
        rows if transform.pre_scale is None else readable(transform.pre_scale),
        rows if transform.signs is None else readable(transform.signs),
        hadamard_operand(transform, options, rows),
        codes.view(torch.int16),
        scale,
        row_stride(rows),
        k * x.element_size() // rows.element_size(),
        m,
        ACT=act,
        **options,
        **overlap(x.device),
    )
    return codes, scale
