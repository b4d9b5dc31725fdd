"""bfloat16 pass-through: a layer that keeps 16 bits, and the fp baseline inside a compressed model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import Format, TensorLayout, Tensors
from ..spec import FormatSpec


class Bf16(Format):
    """weight bfloat16 [N, K]."""

    tag = "16"

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        return {"weight": TensorLayout((n, k), torch.bfloat16)}

    def encode(self, weight: Tensor, spec: FormatSpec) -> Tensors:
        return {"weight": weight.to(torch.bfloat16)}

    def decode(self, tensors: Tensors, k: int, spec: FormatSpec) -> Tensor:
        return tensors["weight"].float()


FORMAT = Bf16()
