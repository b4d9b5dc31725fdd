"""The block-scaled FP4 formats of the hardware that has them: MXFP4 and NVFP4. Elements are E2M1 (`minifloat.py`).

    w = e * block[n, k // g] * weight_scale[n]

MXFP4  g = 32, block = 2^(b - 127) (E8M0). The standard takes 2^floor(log2 max) / 4 and lets elements above 6 saturate
       (OCP Microscaling 1.0, 6.3); here a block may have twice that, where its squared error is less
NVFP4  g = 16, block in E4M3, max / 6 relative to the row's scale

The row's scale is fitted as 1 for MXFP4; rescaling rows after rounding (`unbiased`) makes it another. NVFP4 has one for
each tensor; one for each row holds any such file and loses less. An activation is quantised the same way, with a scale
a token that keeps its length.

A weight with activations of its own format is multiplied as codes and block scales (`kernels/block_fp4_linear.py`): on
FP4 tensor cores where there are some, elsewhere decoded to bfloat16 inside of the product, which saves memory and no
time. With other activations it is decoded for `F.linear`. For FP4 blocks on int8 tensor cores see `e2m1` with a group
size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.block_fp4_linear import block_fp4_linear
from ..kernels.block_scales import E2M1, block_halves
from ..kernels.pack import pack_codes, unpack_codes
from ..kernels.quant_token_block_fp4 import quant_token_block_fp4
from .format import ScalarFormat, TensorLayout, Tensors, group_count
from .spec import FormatSpec, LayerSpec
from .table import table_on

LEVELS = (*(-value for value in E2M1[:0:-1]), *E2M1)
HALVES = tuple(2 * value for value in E2M1)


class BlockFloat(ScalarFormat):
    """weight uint8 [N, ceil(K/2)], even k in the low nibble; weight_block_scale uint8 [N, K / g], bits of E8M0 or E4M3;
    weight_scale float32 [N]."""

    by_rows = True

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout((n, (k + 1) // 2), torch.uint8),
            "weight_block_scale": TensorLayout((n, group_count(k, spec)), torch.uint8),
            "weight_scale": TensorLayout((n,), torch.float32),
        }

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float | None = None) -> Tensors:
        """As in `ScalarFormat`; `clip` None: `own_clip`. 1: the standard's rule."""
        reach = weight.float().reshape(len(weight), group_count(weight.shape[1], spec), -1).abs().amax(-1)
        reach = reach * (self.own_clip(weight, spec) if clip is None else clip)
        bits, row = self.fit_blocks(reach)
        return {"weight_block_scale": bits, "weight_scale": row}

    def fit_blocks(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [N, G], each block's largest magnitude -> bits of block scales, uint8 [N, G], and row scales."""
        raise NotImplementedError

    def block_scale(self, bits: Tensor) -> Tensor:
        """float32: what the bits stand for."""
        raise NotImplementedError

    def quantize(self, weight: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        halves = self._halves(weight, scales).view(weight.shape)
        place = torch.bucketize(halves.abs(), table_on(HALVES, weight.device))
        return torch.where(weight < 0, place + 8, place).to(torch.int8)

    def dequantize(self, codes: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        size = self._element_scale(scales)
        levels = table_on(LEVELS, codes.device)[self.index_of(codes)]
        return (levels.view(*size.shape[:2], -1) * size).view(codes.shape)

    def round(self, x: Tensor, spec: FormatSpec) -> Tensor:
        return self.round_with(x, self.fit(x, spec))

    def round_with(self, weight: Tensor, scales: Tensors) -> Tensor:
        """float32 [N, K]: `dequantize` of `quantize`, in fewer steps."""
        return (self._halves(weight, scales) * (self._element_scale(scales) / 2)).view(weight.shape)

    def levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        return table_on(LEVELS, scales["weight_scale"].device) * self._element_scale(scales)

    def codes_of(self, index: Tensor) -> Tensor:
        place = index - 7
        return torch.where(place < 0, 8 - place, place).to(torch.int8)

    def index_of(self, codes: Tensor) -> Tensor:
        magnitude = codes.long() & 7
        return 7 + torch.where(codes >= 8, -magnitude, magnitude)

    def pack(self, codes: Tensor) -> Tensor:
        return pack_codes(codes, 4)

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        return unpack_codes(packed, k, 4).to(torch.int8)

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("quant_token_block_fp4", "block_fp4_linear") if spec.activation == spec.weight else ()

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        if spec.activation != spec.weight:
            return super().linear(x, tensors, spec, bias)
        rows = quant_token_block_fp4(x, spec.weight.group_size or 0)
        weight = (tensors["weight"], tensors["weight_block_scale"], tensors["weight_scale"])
        return block_fp4_linear(*rows, *weight, bias, x.dtype)

    def _halves(self, weight: Tensor, scales: Tensors) -> Tensor:
        """float32 [N, G, g]: the nearest elements, times 2."""
        size = self._element_scale(scales)
        return block_halves(weight.float().reshape(*size.shape[:2], -1), size)

    def _element_scale(self, scales: Tensors) -> Tensor:
        """float32 [N, G, 1]."""
        return (self.block_scale(scales["weight_block_scale"]) * scales["weight_scale"][:, None])[..., None]
