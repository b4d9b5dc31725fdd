"""Ternary weights, four to a byte: `w = q * weight_scale[n]`, q in -1, 0, 1 (TerDiT, Lu et al. 2024, arXiv 2405.14854).

A layer decodes *exactly* to int8 with one fp32 scale per row and runs the 8-bit products. The scale keeps its sign:
TerDiT learns it, one for a layer, and it may end up negative; it is stored once a row.

A model is trained with such weights. Rounding one that was not leaves 7.2 dB of a normal weight, below what a sampler
can use, so `calibrate` refuses unless told otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.codebook_decode import codebook_to_int8
from ...kernels.pack import code_bytes, pack_codes, unpack_codes
from ..format import ScalarFormat, TensorLayout, Tensors, activation_ops
from ..integer import TINY, int8_form_linear
from ..spec import FormatSpec, LayerSpec

ITERATIONS = 8


class Ternary(ScalarFormat):
    """weight uint8 [N, ceil(K/4)], q + 1 as 2-bit codes, the first k in the lowest bits; weight_scale float32 [N]."""

    tag = "t"
    by_rows = True
    refusal = (
        "ternary weights destroy a model that was not trained with them; `--bits w2a16` or `w2a8` (vq4dit) is about as "
        "small and far closer, and `vdit-quant convert` imports a model trained with them"
    )

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout((n, code_bytes(k, 2)), torch.uint8),
            "weight_scale": TensorLayout((n,), torch.float32),
        }

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float = 1.0) -> Tensors:
        """The scale of least squared error: the mean size of the elements that round to 1 or -1, which depend on it
        (Lloyd 1982). It starts above, so that small elements start as zeros."""
        size = weight.float().abs()
        scale = 1.5 * size.mean(1, keepdim=True)
        for _ in range(ITERATIONS):
            kept = size > scale / 2
            scale = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
        return {"weight_scale": (scale * clip)[:, 0]}

    def quantize(self, weight: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        scale = scales["weight_scale"][:, None]
        usable = torch.where(scale.abs() > TINY, scale, float("inf"))  # a row whose scale is zero is zeros
        return (weight.float() / usable).round().clamp(-1, 1).to(torch.int8)

    def dequantize(self, codes: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        return codes.float() * scales["weight_scale"][:, None]

    def levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        scale = scales["weight_scale"]
        return torch.arange(-1.0, 2.0, device=scale.device) * scale[:, None, None].abs()

    def codes_of(self, index: Tensor) -> Tensor:
        return (index - 1).to(torch.int8)

    def index_of(self, codes: Tensor) -> Tensor:
        return codes.long() + 1

    def pack(self, codes: Tensor) -> Tensor:
        return pack_codes(codes + 1, 2)

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        return unpack_codes(packed, k, 2).to(torch.int8) - 1

    def to_int8(self, tensors: Tensors, k: int, spec: FormatSpec) -> tuple[Tensor, Tensor]:
        # made on the device, because a copy from the host cannot be captured in a CUDA graph; no code is 3
        book = torch.arange(-1, 3, dtype=torch.int8, device=tensors["weight"].device).view(1, 4, 1)
        return codebook_to_int8(tensors["weight"], book, None, None, k), tensors["weight_scale"]

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        rows = activation_ops(spec.activation)
        product = ("int8_weight_linear",) if rows is None else ("int8_linear",)
        return (*(rows or ()), "codebook_to_int8", *product)

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        """x: float [M, K] -> [M, N] in x's dtype."""
        return int8_form_linear(x, *self.to_int8(tensors, x.shape[-1], spec.weight), spec, bias)


FORMAT = Ternary()
