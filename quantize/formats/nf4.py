"""NF4: four-bit normal floats, weight-only, as bitsandbytes stores them (Dettmers et al. 2023, arXiv 2305.14314).

    w = LEVELS[code] * weight_absmax[n, k // 64]

The levels are the quantiles of a normal distribution. The layout is that of `bitsandbytes.functional.quantize_4bit`,
so that its kernels decode the stored tensors where the package is installed, and torch does elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.pack import pack_codes, unpack_codes
from ..format import ScalarFormat, TensorLayout, Tensors, quantize_activation
from ..integer import TINY
from ..spec import FormatSpec, LayerSpec
from ..table import table_on

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Nf4(ScalarFormat):
    """weight uint8 [N, K/2], even k in the *high* nibble; weight_absmax float32 [N, K / 64]."""

    tag = "nf4"
    by_rows = True
    group_sizes = (64,)

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout((n, k // 2), torch.uint8),
            "weight_absmax": TensorLayout((n, k // 64), torch.float32),
        }

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float = 1.0) -> Tensors:
        return {"weight_absmax": weight.float().reshape(len(weight), -1, 64).abs().amax(-1) * clip}

    def quantize(self, weight: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        levels = table_on(LEVELS, weight.device)
        size = _element_scale(scales)
        return torch.bucketize(weight.float() / size.clamp_min(TINY), (levels[1:] + levels[:-1]) / 2).to(torch.int8)

    def dequantize(self, codes: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        return table_on(LEVELS, codes.device)[codes.long()] * _element_scale(scales)

    def levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        size = scales["weight_absmax"]
        return table_on(LEVELS, size.device) * size[..., None]

    def codes_of(self, index: Tensor) -> Tensor:
        return index.to(torch.int8)

    def index_of(self, codes: Tensor) -> Tensor:
        return codes.long()

    def pack(self, codes: Tensor) -> Tensor:
        return _swap(pack_codes(codes, 4))

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        return unpack_codes(_swap(packed), k, 4).to(torch.int8)

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        """x: float [M, K] -> [M, N] in x's dtype."""
        x = quantize_activation(x, spec.activation)
        weight, absmax, bias = tensors["weight"], tensors["weight_absmax"], None if bias is None else bias.to(x.dtype)
        library = _library() if x.device.type == "cuda" else None
        if library is None:
            return F.linear(x, self.decode(tensors, x.shape[1], spec.weight).to(x.dtype), bias)
        shape = torch.Size((len(weight), x.shape[1]))
        state = library.QuantState(
            absmax.flatten(), shape=shape, code=table_on(LEVELS, x.device), blocksize=64, quant_type="nf4",
            dtype=x.dtype,
        )  # fmt: skip
        return F.linear(x, library.dequantize_4bit(weight.view(-1, 1), state), bias)


def _element_scale(scales: Tensors) -> Tensor:
    """float32 [N, K]."""
    return scales["weight_absmax"].repeat_interleave(64, 1)


def _swap(packed: Tensor) -> Tensor:
    """The two nibbles of every byte exchanged."""
    return (packed << 4) | (packed >> 4)


@cache
def _library() -> Any:
    """`bitsandbytes.functional`; None where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    return importlib.import_module("bitsandbytes.functional")


FORMAT = Nf4()
