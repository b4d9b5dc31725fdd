"""Symmetric 4-bit integers, two to a byte, whose every layer decodes *exactly* to int8 with one scale per row.

Per row:     `w = q * weight_scale[n]`, q in [-8, 7].
With groups: `w = v * weight_scale[n]`, `v = (q * weight_group_scale[n, g] + 8) >> 4`, an int8 in [-127, 127].

The group scale is an unsigned 8-bit fixed-point number with four fractional bits (see `quantize/integer.py`). A product
is bit-equal whether the weight is unpacked once or inside the kernel.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels.int4_linear import int4_linear, int4_to_int8, int4_weight_linear
from ...kernels.pack import pack_int4, unpack_int4
from ...kernels.quant_token_int4 import quant_token_int4
from ..format import Tensors, activation_codes, activation_ops, quantize_activation
from ..integer import GroupedInteger
from ..spec import FormatSpec, LayerSpec


class Int4(GroupedInteger):
    """weight uint8 [N, ceil(K/2)], even k in the low nibble; weight_scale float32 [N]; with groups also
    weight_group_scale uint8 [N, K / group_size]."""

    tag = "4"

    def width(self, k: int) -> int:
        return (k + 1) // 2

    def pack(self, codes: Tensor) -> Tensor:
        return pack_int4(codes)

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        return unpack_int4(packed, k)

    def to_int8(self, tensors: Tensors, k: int, spec: FormatSpec) -> tuple[Tensor, Tensor]:
        return int4_to_int8(tensors["weight"], tensors.get("weight_group_scale"), k), tensors["weight_scale"]

    def quantize_rows(self, x: Tensor, spec: FormatSpec) -> tuple[Tensor, Tensor]:
        return quant_token_int4(x, spec.group_size or 0)

    def row_ops(self, spec: FormatSpec) -> tuple[str, ...]:
        return ("quant_token_int4",)

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        rows = activation_ops(spec.activation)
        return ("int4_weight_linear",) if rows is None else (*rows, "int4_linear")

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        weight, scale, group = tensors["weight"], tensors["weight_scale"], tensors.get("weight_group_scale")
        held = activation_codes(x, spec.activation)
        if held is not None:
            return int4_linear(*held, weight, scale, group, bias, x.dtype)
        return int4_weight_linear(quantize_activation(x, spec.activation), weight, scale, group, bias)


FORMAT = Int4(4)
