"""Symmetric 8-bit integers, one fp32 scale per row: `w = code * weight_scale[n]`, codes in [-127, 127].

Leaving -128 out keeps the grid symmetric and lets sums of 1024 products stay exact in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.int8_linear import int8_linear, int8_weight_linear
from ...kernels.quant_token import quant_token
from ..format import ScalarFormat, TensorLayout, Tensors, activation_codes, activation_ops, quantize_activation
from ..spec import FormatSpec, LayerSpec

TINY = torch.finfo(torch.float32).tiny


class Int8(ScalarFormat):
    """weight int8 [N, K], weight_scale float32 [N]."""

    tag = "8"
    by_rows = True

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        return {"weight": TensorLayout((n, k), torch.int8), "weight_scale": TensorLayout((n,), torch.float32)}

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float = 1.0) -> Tensors:
        amax = weight.float().abs().amax(1, keepdim=True) * clip
        return {"weight_scale": (amax / 127).clamp_min(TINY)[:, 0]}

    def quantize(self, weight: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        return (weight / scales["weight_scale"][:, None]).round_().clamp_(-127, 127).to(torch.int8)

    def dequantize(self, codes: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        return codes.float() * scales["weight_scale"][:, None]

    def levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        codes = torch.arange(-127, 128, device=scales["weight_scale"].device)
        return codes.float() * scales["weight_scale"][:, None, None]

    def codes_of(self, index: Tensor) -> Tensor:
        return (index - 127).to(torch.int8)

    def index_of(self, codes: Tensor) -> Tensor:
        return codes.long() + 127

    def to_int8(self, tensors: Tensors, k: int, spec: FormatSpec) -> tuple[Tensor, Tensor]:
        return tensors["weight"], tensors["weight_scale"]

    def quantize_rows(self, x: Tensor, spec: FormatSpec) -> tuple[Tensor, Tensor]:
        return quant_token(x)

    def row_ops(self, spec: FormatSpec) -> tuple[str, ...]:
        return ("quant_token",)

    def row_form(self, spec: FormatSpec) -> str:
        return "int8"

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        rows = activation_ops(spec.activation)
        return ("int8_weight_linear",) if rows is None else (*rows, "int8_linear")

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        weight, scale = tensors["weight"], tensors["weight_scale"]
        held = activation_codes(x, spec.activation)
        if held is not None:
            return int8_linear(*held, weight, scale, bias, x.dtype)
        return int8_weight_linear(quantize_activation(x, spec.activation), weight, scale, bias)


FORMAT = Int8()
