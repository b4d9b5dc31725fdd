"""Signed integers of a few bits whose every layer decodes *exactly* to int8 with one fp32 scale per row.

Per row:     `w = c * weight_scale[n]`.
With groups: `w = v * weight_scale[n]`, `v = (c * weight_group_scale[n, g] + 2^(f-1)) >> f`, an int8 in [-127, 127].

`c` is what the code q in [-2^(b-1), 2^(b-1) - 1] stands for: q itself, or 2q + 1 on an odd grid, which has no zero but
as much reach on both sides. The group scale is an unsigned 8-bit fixed-point number with f fractional bits, relative to
the row's scale; f is the smallest for which |c| * 255 / 2^f <= 127.5 always holds: b, and b + 1 on an odd grid. So a
product with int8 activations is an integer product on ordinary int8 tensor cores with one fp32 scale per row in the
epilogue, and a group costs 8 bits. (Two-level scales after QServe, Lin et al. 2024, arXiv 2405.04532, with a finer,
rounded inner level.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.int8_linear import int8_linear, int8_weight_linear
from ..kernels.pack import pack_bits, unpack_bits
from ..kernels.packed_decode import packed_to_int8
from .format import (
    ScalarFormat,
    TensorLayout,
    Tensors,
    activation_codes,
    activation_ops,
    group_count,
    quantize_activation,
)
from .spec import FormatSpec, LayerSpec

Codes = TypeVar("Codes", int, Tensor)

TINY = torch.finfo(torch.float32).tiny
LONE = 0.9
"""A group of which one element holds more of the squares than this is never clipped: the element is all it has."""


class GroupedInteger(ScalarFormat):
    """weight uint8 [N, `width(K)`]; weight_scale float32 [N]; with groups also weight_group_scale uint8
    [N, K / group_size]. A subclass says how the codes are packed.

    bits  bits of a code
    odd   c = 2q + 1 instead of q
    clip  group size -> the part of a group's range that `fit` covers unless told; 1 where it is not given
    """

    by_rows = True
    group_sizes = (None, 16, 32, 64, 128)
    largest = 255  # the group scale of the largest step of a row, before it is held to 8 bits

    def __init__(self, bits: int, odd: bool = False, clip: Mapping[int | None, float] | None = None) -> None:
        self.bits = bits
        self.odd = odd
        self.low, self.high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        self.one = 1 << (bits + odd)  # 1.0 as a group scale
        self.clip = dict(clip or {})

    def width(self, k: int) -> int:
        """Bytes that a row of `k` codes is packed into."""
        raise NotImplementedError

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        out = {
            "weight": TensorLayout((n, self.width(k)), torch.uint8),
            "weight_scale": TensorLayout((n,), torch.float32),
        }
        if spec.group_size is not None:
            out["weight_group_scale"] = TensorLayout((n, group_count(k, spec)), torch.uint8)
        return out

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float | None = None) -> Tensors:
        """As in `ScalarFormat`; `clip` None: `own_clip`."""
        groups = self._groups(weight, spec)
        step = self._covering(groups) * (self.own_clip(weight, spec) if clip is None else clip)
        empty = (groups == 0).all(-1) if self.odd else None  # without a code for zero its scale has to be zero
        if spec.group_size is None:
            row = step[:, 0].clamp_min(TINY)
            return {"weight_scale": row if empty is None else row.masked_fill(empty[:, 0], 0)}
        row = (step.amax(1) / (self.largest / self.one)).clamp_min(TINY)
        relative = (step / row[:, None] * self.one).round().clamp(1, 255)
        relative = relative if empty is None else relative.masked_fill(empty, 0)
        return {"weight_scale": row, "weight_group_scale": relative.to(torch.uint8)}

    def own_clip(self, weight: Tensor, spec: FormatSpec) -> Tensor | float:
        """The constant `clip` ratio, but 1 where covering the range has the lower squared error (values that lie on the
        grid already) and where one element is nearly all that a group holds."""
        ratio = self.clip.get(spec.group_size, 1.0)
        if ratio == 1.0:
            return 1.0
        groups = self._groups(weight, spec)
        target = groups / self._covering(groups)[..., None]
        covered, clipped = ((self._value(self._code(target / r)) * r - target).square().sum(-1) for r in (1.0, ratio))
        squares = target.square()
        keep = (covered <= clipped) | (squares.amax(-1) > LONE * squares.sum(-1))
        return torch.where(keep, 1.0, ratio)

    def quantize(self, weight: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        target = weight / scales["weight_scale"].clamp_min(TINY)[:, None]
        if spec.group_size is None:
            return self._code(target).to(torch.int8)
        relative = self._relative(scales, spec)
        nearest = self._code(target * self.one / relative.clamp_min(1))
        # the levels are rounded to integers, so a neighbour may be nearer than the rounded code
        best, error = nearest, (self._level(nearest, relative) - target).abs_()
        for offset in (-1, 1):
            other = (nearest + offset).clamp_(self.low, self.high)
            distance = (self._level(other, relative) - target).abs_()
            closer = distance < error
            best, error = torch.where(closer, other, best), torch.where(closer, distance, error)
        return best.to(torch.int8)

    def dequantize(self, codes: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        if spec.group_size is None:
            level = self._value(codes.float())
        else:
            level = self._level(codes.float(), self._relative(scales, spec))
        return level * scales["weight_scale"][:, None]

    def levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        row = scales["weight_scale"][:, None, None]
        codes = torch.arange(self.low, self.high + 1, device=row.device).float()
        if spec.group_size is None:
            return self._value(codes) * row
        return self._level(codes, scales["weight_group_scale"].float()[..., None]) * row

    def codes_of(self, index: Tensor) -> Tensor:
        return (index + self.low).to(torch.int8)

    def index_of(self, codes: Tensor) -> Tensor:
        return codes.long() - self.low

    def _groups(self, weight: Tensor, spec: FormatSpec) -> Tensor:
        """float32 [N, groups, group_size]."""
        return weight.float().reshape(len(weight), group_count(weight.shape[1], spec), -1)

    def _covering(self, groups: Tensor) -> Tensor:
        """[N, groups]: the smallest step whose grid covers both ends, which may reach differently far."""
        ends = torch.maximum(groups.amax(-1) / self._value(self.high), groups.amin(-1) / self._value(self.low))
        return ends.clamp_min(TINY)

    def _relative(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        """float32 [N, K]: the group scale of every element."""
        return scales["weight_group_scale"].float().repeat_interleave(spec.group_size or 1, 1)

    def _value(self, code: Codes) -> Codes:
        """What a code stands for, in steps."""
        return 2 * code + 1 if self.odd else code

    def _code(self, target: Tensor) -> Tensor:
        """float32, in steps -> the code, as float32, whose value is nearest."""
        return ((target - 1) / 2 if self.odd else target).round().clamp_(self.low, self.high)

    def _level(self, code: Tensor, relative: Tensor) -> Tensor:
        """(c * relative + 2^(f-1)) >> f in float32, where it is exact."""
        return torch.floor((self._value(code) * relative + self.one // 2) / self.one)


class PackedInteger(GroupedInteger):
    """Codes packed without gaps, eight in `bits` bytes (`kernels/pack.py`); a layer decodes them to int8 once and runs
    the int8 product."""

    def __init__(self, bits: int, odd: bool = False, clip: Mapping[int | None, float] | None = None) -> None:
        super().__init__(bits, odd, clip)
        # the extreme code of the largest step then decodes without rounding: -127, or 3 * 32 on the odd 2-bit grid
        self.largest = 256 if odd else 254

    def width(self, k: int) -> int:
        return (k + 7) // 8 * self.bits

    def pack(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.bits)

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        return unpack_bits(packed, k, self.bits)

    def to_int8(self, tensors: Tensors, k: int, spec: FormatSpec) -> tuple[Tensor, Tensor]:
        group = tensors.get("weight_group_scale")
        return packed_to_int8(tensors["weight"], group, k, self.bits, self.odd), tensors["weight_scale"]

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        rows = activation_ops(spec.activation)
        return ("packed_to_int8", "int8_weight_linear") if rows is None else (*rows, "packed_to_int8", "int8_linear")

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        """x: float [M, K] -> [M, N] in x's dtype."""
        return int8_form_linear(x, *self.to_int8(tensors, x.shape[-1], spec.weight), spec, bias)


def int8_form_linear(x: Tensor, weight: Tensor, scale: Tensor, spec: LayerSpec, bias: Tensor | None) -> Tensor:
    """The layer of a weight int8 [N, K] with one float32 scale a row: an integer product where the activations have
    such a form too, else a weight-only one. x float [M, K] -> [M, N] in x's dtype."""
    held = activation_codes(x, spec.activation)
    if held is not None:
        return int8_linear(*held, weight, scale, bias, x.dtype)
    return int8_weight_linear(quantize_activation(x, spec.activation), weight, scale, bias)
