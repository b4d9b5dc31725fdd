"""Symmetric 4-bit integers whose every layer decodes *exactly* to int8 with one scale per row.

Per row:     `w = q * weight_scale[n]`, q in [-8, 7].
With groups: `w = v * weight_scale[n]`, `v = (q * weight_group_scale[n, g] + 8) >> 4`, an int8 in [-127, 127].

The group scale is an unsigned 8-bit fixed-point number with four fractional bits, relative to the row's scale. So a
W4A8 product is an integer product on ordinary int8 tensor cores with one fp32 scale per row in the epilogue, bit-equal
whether it is unpacked once or inside the kernel, and a group costs 8 bits. (Two-level scales after QServe, Lin et al.
2024, arXiv 2405.04532, with a finer, rounded inner level.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.int4_linear import int4_linear, int4_weight_linear
from ...kernels.pack import pack_int4, unpack_int4
from ...kernels.quant_token import quant_token
from ..format import ScalarFormat, TensorLayout, Tensors, group_count, group_of, quantize_activation
from ..spec import FormatSpec, LayerSpec

TINY = torch.finfo(torch.float32).tiny
TOKEN = FormatSpec("int8")
FRACTION = 16  # the fixed point of weight_group_scale
LARGEST = 255 / FRACTION


class Int4(ScalarFormat):
    """weight uint8 [N, ceil(K/2)], even k in the low nibble; weight_scale float32 [N]; with groups also
    weight_group_scale uint8 [N, K / group_size]."""

    tag = "4"
    group_sizes = (None, 16, 32, 64, 128)

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        out = {
            "weight": TensorLayout((n, (k + 1) // 2), torch.uint8),
            "weight_scale": TensorLayout((n,), torch.float32),
        }
        if spec.group_size is not None:
            out["weight_group_scale"] = TensorLayout((n, group_count(k, spec)), torch.uint8)
        return out

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float = 1.0) -> Tensors:
        groups = weight.float().reshape(len(weight), group_count(weight.shape[1], spec), -1)
        # the grid reaches -8 but only +7: the smallest step that still covers both ends
        step = torch.maximum(groups.amax(-1) / 7, -groups.amin(-1) / 8).clamp_min(TINY) * clip
        if spec.group_size is None:
            return {"weight_scale": step[:, 0].clamp_min(TINY)}
        row = (step.amax(1) / LARGEST).clamp_min(TINY)
        relative = (step / row[:, None] * FRACTION).round().clamp(1, 255)
        return {"weight_scale": row, "weight_group_scale": relative.to(torch.uint8)}

    def quantize(self, weight: Tensor, scales: Tensors, spec: FormatSpec, columns: slice = slice(None)) -> Tensor:
        target = weight / scales["weight_scale"][:, None]
        if spec.group_size is None:
            return target.round_().clamp_(-8, 7).to(torch.int8)
        relative = self._relative(scales, spec, columns)
        nearest = (target * FRACTION / relative).round_().clamp_(-8, 7)
        # the levels are rounded to integers, so a neighbour may be nearer than the rounded code
        best, error = nearest, (_level(nearest, relative) - target).abs_()
        for offset in (-1, 1):
            other = (nearest + offset).clamp_(-8, 7)
            distance = (_level(other, relative) - target).abs_()
            closer = distance < error
            best, error = torch.where(closer, other, best), torch.where(closer, distance, error)
        return best.to(torch.int8)

    def dequantize(self, codes: Tensor, scales: Tensors, spec: FormatSpec, columns: slice = slice(None)) -> Tensor:
        level = codes.float()
        if spec.group_size is not None:
            level = _level(level, self._relative(scales, spec, columns))
        return level * scales["weight_scale"][:, None]

    def _relative(self, scales: Tensors, spec: FormatSpec, columns: slice) -> Tensor:
        """float32 [N, C]: the group scale of every element of the given columns."""
        table = scales["weight_group_scale"]
        k = table.shape[1] * (spec.group_size or 1)
        return table.float()[:, group_of(k, spec, columns, table.device)]

    def levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        row = scales["weight_scale"][:, None, None]
        codes = torch.arange(-8, 8, device=row.device).float()
        if spec.group_size is None:
            return codes * row
        return _level(codes, scales["weight_group_scale"].float()[..., None]) * row

    def codes_of(self, index: Tensor) -> Tensor:
        return (index - 8).to(torch.int8)

    def index_of(self, codes: Tensor) -> Tensor:
        return codes.long() + 8

    def pack(self, codes: Tensor) -> Tensor:
        return pack_int4(codes)

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        return unpack_int4(packed, k)

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("quant_token", "int4_linear") if spec.activation == TOKEN else ("int4_weight_linear",)

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        weight, scale, group = tensors["weight"], tensors["weight_scale"], tensors.get("weight_group_scale")
        if spec.activation == TOKEN:
            codes, x_scale = quant_token(x)
            return int4_linear(codes, x_scale, weight, scale, group, bias, x.dtype)
        return int4_weight_linear(quantize_activation(x, spec.activation), weight, scale, group, bias)


def _level(code: Tensor, relative: Tensor) -> Tensor:
    """(code * relative + 8) >> 4 in float32, where it is exact."""
    return torch.floor((code * relative + 8) / FRACTION)


FORMAT = Int4()
