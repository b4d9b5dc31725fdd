"""Triton twins of `norm_quant` and `gate_norm_quant`: every token is read once and stays in registers."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm_quant import Norm
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
    store_tile,
    tile_options,
    token_sums,
    transform_tile,
    unsupported,
)
from .tiles import await_inputs, overlap

__all__ = ["limits", "note", "run", "supports"]


@triton.jit
def gated_tile(
    x, branch_ptr, gate_ptr, h_ptr, branch_at, gate_at, h_at, live,
    FROM: tl.constexpr, HAS_GATE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """x + gate * branch, stored in h's type; returns what was stored."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    W: tl.constexpr = x.shape[2]
    branch = load_tile(branch_ptr, branch_at, FROM, R, C, W, K)
    if HAS_GATE:
        branch = load_tile(gate_ptr, gate_at, FROM, R, C, W, K) * branch
    h = (x + branch).to(h_ptr.dtype.element_ty)
    store_tile(h_ptr, h_at, h, live, FROM, C, W, K)
    return h.to(tl.float32)


@triton.jit
def affine_tile(
    y, weight_ptr, bias_ptr, shift_ptr, scale_ptr, zero, shift_at, scale_at,
    FROM: tl.constexpr, AFFINE: tl.constexpr, HAS_MOD: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(y * weight + bias) * (1 + scale) + shift; AFFINE is how many of weight and bias there are."""
    R: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    W: tl.constexpr = y.shape[2]
    if AFFINE > 0:
        y = y * load_tile(weight_ptr, zero, FROM, R, C, W, K)
    if AFFINE > 1:
        y = y + load_tile(bias_ptr, zero, FROM, R, C, W, K)
    if HAS_MOD:
        y = y * (1.0 + load_tile(scale_ptr, scale_at, FROM, R, C, W, K))
        y = y + load_tile(shift_ptr, shift_at, FROM, R, C, W, K)
    return y


@triton.jit(do_not_specialize=["M", "TOKENS"])
def norm_quant_kernel(
    x_ptr, branch_ptr, gate_ptr, h_ptr, shift_ptr, mod_scale_ptr, weight_ptr, bias_ptr, pre_scale_ptr, signs_ptr,
    hadamard_ptr, pairs_ptr, scale_ptr, x_stride, branch_stride, gate_stride, shift_stride, mod_scale_stride,
    M, TOKENS, eps,
    LAYER: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MOD: tl.constexpr,
    AFFINE: tl.constexpr, HAS_PRE_SCALE: tl.constexpr, HAS_SIGNS: tl.constexpr, INT8: tl.constexpr,
    FP4: tl.constexpr, TINY: tl.constexpr, DOT: tl.constexpr, SIZE: tl.constexpr, MIN_ROWS: tl.constexpr,
    FLAT: tl.constexpr, K: tl.constexpr, W: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """R tokens at a time; TOKENS of them share a row of gate, shift and scale."""
    await_inputs()
    TWO: tl.constexpr = REST > 0
    h = load_hadamard(hadamard_ptr, SIZE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, R), tl.num_programs(0)):
        row = tile * R + tl.arange(0, R)
        live = row < M
        # Rows beyond the edge repeat the last one: their results are never stored, and the loads need no row mask.
        row = tl.minimum(row, M - 1)
        sample = (row // TOKENS).to(tl.int64)[:, None, None]
        zero = sample * 0
        at = row.to(tl.int64)[:, None, None]
        x1 = load_tile(x_ptr, at * x_stride, 0, R, FIRST, W, K)
        x2 = x1
        if TWO:
            x2 = load_tile(x_ptr, at * x_stride, FIRST, R, REST, W, K)
        if HAS_BRANCH:
            x1 = gated_tile(
                x1, branch_ptr, gate_ptr, h_ptr, at * branch_stride, sample * gate_stride, at * K, live, 0,
                HAS_GATE, K,
            )  # fmt: skip
            if TWO:
                x2 = gated_tile(
                    x2, branch_ptr, gate_ptr, h_ptr, at * branch_stride, sample * gate_stride, at * K, live, FIRST,
                    HAS_GATE, K,
                )  # fmt: skip
        if LAYER:
            mean = (token_sums(x1, x2, TWO, FLAT) / K)[:, None, None]
            x1 = x1 - mean
            if TWO:
                x2 = x2 - mean
                if (FIRST + REST) * W > K:
                    k = FIRST * W + tl.arange(0, REST)[None, :, None] * W + tl.arange(0, W)[None, None, :]
                    x2 = tl.where(k < K, x2, 0.0)
        power = token_sums(x1 * x1, x2 * x2, TWO, FLAT) / K
        factor = tl.rsqrt(power + eps)[:, None, None]
        y1 = affine_tile(
            x1 * factor, weight_ptr, bias_ptr, shift_ptr, mod_scale_ptr, zero, sample * shift_stride,
            sample * mod_scale_stride, 0, AFFINE, HAS_MOD, K,
        )  # fmt: skip
        y1 = transform_tile(y1, pre_scale_ptr, signs_ptr, zero, 0, HAS_PRE_SCALE, HAS_SIGNS, K)
        y2 = y1
        if TWO:
            y2 = affine_tile(
                x2 * factor, weight_ptr, bias_ptr, shift_ptr, mod_scale_ptr, zero, sample * shift_stride,
                sample * mod_scale_stride, FIRST, AFFINE, HAS_MOD, K,
            )  # fmt: skip
            y2 = transform_tile(y2, pre_scale_ptr, signs_ptr, zero, FIRST, HAS_PRE_SCALE, HAS_SIGNS, K)
        quantize_tokens(
            y1, y2, h, pairs_ptr, scale_ptr, row, live,
            INT8, FP4, TINY, DOT, SIZE, MIN_ROWS, K, FIRST, TWO, FLAT,
        )  # fmt: skip


def supports(op: str, x: Tensor, *rest: Any) -> str | None:
    """`limits` of these tensors."""
    return unsupported(op, x, x.shape[1], rest[-1])


def run(op: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`norm_quant` of (x, norm, transform) or `gate_norm_quant` of (residual, [branch, gate?], norm, transform)."""
    others, norm, transform = rest if op.startswith("gate") else ([], *rest)
    stream, norm = shared_alike([x, *others], norm)
    gluon = gluon_for(x, x.shape[1], 0, transform)
    if gluon is not None:
        try:
            return gluon.run_norm(stream, norm, transform)
        except Exception as error:
            GLUON.leave(x.device, error)
    codes, scale = transform.empty(x, x.shape[1])
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device) if others else x
    if x.shape[0]:
        _launch(stream, h, norm, transform, (codes, scale))
    return (h, codes, scale) if others else (codes, scale)


def shared_alike(stream: list[Tensor], norm: Norm) -> tuple[list[Tensor], Norm]:
    """The same with as many rows of gate as of shift and scale: the kernels know one number of tokens per row."""
    if len(stream) < 3 or not norm.mod or len(stream[2]) == len(norm.mod[0]):
        return stream, norm
    rows = math.lcm(len(stream[2]), len(norm.mod[0]))
    gate, *mod = (t.repeat_interleave(rows // len(t), dim=0) for t in (stream[2], *norm.mod))
    return [*stream[:2], gate], replace(norm, mod=mod)


def _launch(stream: list[Tensor], h: Tensor, norm: Norm, transform: Transform, out: tuple[Tensor, Tensor]) -> None:
    m, options = h.shape[0], tile_options(h.shape[1], transform)
    x, branch, gate = [*(readable(t) for t in stream), h, h][:3]
    shift, mod_scale = [readable(t) for t in norm.mod] or [h, h]
    weight, bias = [*(readable(t) for t in norm.affine), h, h][:2]
    shared = norm.mod[:1] + stream[2:]
    norm_quant_kernel[programs(m, options, h.device)](
        x,
        branch,
        gate,
        h,
        shift,
        mod_scale,
        weight,
        bias,
        h if transform.pre_scale is None else readable(transform.pre_scale),
        h if transform.signs is None else readable(transform.signs),
        hadamard_operand(transform, options, h),
        out[0].view(torch.int16),
        out[1],
        *(row_stride(t) for t in (x, branch, gate, shift, mod_scale)),
        m,
        m // shared[0].shape[0] if shared else m,
        norm.eps,
        LAYER=norm.kind == "layer",
        HAS_BRANCH=len(stream) > 1,
        HAS_GATE=len(stream) > 2,
        HAS_MOD=bool(norm.mod),
        AFFINE=len(norm.affine),
        **options,
        **overlap(h.device),
    )
