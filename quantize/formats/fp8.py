"""8-bit floats (e4m3), one fp32 scale per row: `w = value * weight_scale[n]`, |value| <= 448.

The relative error is the same for small and for large values (31.5 dB whatever the distribution), so that outliers cost
nothing; without them int8 is more exact. Micikevicius et al. 2022, arXiv 2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.fp8_linear import E4M3, LIMIT, fp8_linear, quant_token_fp8
from ..format import ScalarFormat, TensorLayout, Tensors
from ..spec import FormatSpec, LayerSpec

TINY = torch.finfo(torch.float32).tiny
TOKEN = FormatSpec("fp8")
# A code is the byte of its value. Negative zero (0x80) is never written.
CODES = torch.tensor([*range(0x7E, 0, -1), 0, *range(1, 0x7F)], dtype=torch.int8)
CODES[:0x7E] |= -128
VALUES = CODES.view(E4M3).float()


class Fp8(ScalarFormat):
    """weight float8_e4m3fn [N, K], weight_scale float32 [N]."""

    tag = "f8"
    by_rows = True

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        return {"weight": TensorLayout((n, k), E4M3), "weight_scale": TensorLayout((n,), torch.float32)}

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float = 1.0) -> Tensors:
        amax = weight.float().abs().amax(1, keepdim=True) * clip
        return {"weight_scale": (amax / LIMIT).clamp_min(TINY)[:, 0]}

    def quantize(self, weight: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        codes = (weight.float() / scales["weight_scale"][:, None]).clamp_(-LIMIT, LIMIT).to(E4M3).view(torch.int8)
        return codes.masked_fill_(codes == -128, 0)

    def dequantize(self, codes: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        return codes.contiguous().view(E4M3).float() * scales["weight_scale"][:, None]

    def levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        return VALUES.to(scales["weight_scale"].device) * scales["weight_scale"][:, None, None]

    def codes_of(self, index: Tensor) -> Tensor:
        return CODES.to(index.device)[index]

    def index_of(self, codes: Tensor) -> Tensor:
        size = (codes & 0x7F).long()
        return 0x7E + torch.where(codes < 0, -size, size)

    def pack(self, codes: Tensor) -> Tensor:
        return codes.contiguous().view(E4M3)

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        return packed.view(torch.int8)

    def to_fp8(self, tensors: Tensors, k: int, spec: FormatSpec) -> tuple[Tensor, Tensor]:
        return tensors["weight"], tensors["weight_scale"]

    def row_form(self, spec: FormatSpec) -> str:
        return "fp8"

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("quant_token_fp8", "fp8_linear") if spec.activation == TOKEN else ()

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        if spec.activation != TOKEN:
            return super().linear(x, tensors, spec, bias)
        codes, x_scale = quant_token_fp8(x)
        return fp8_linear(codes, x_scale, tensors["weight"], tensors["weight_scale"], bias, x.dtype)


FORMAT = Fp8()
