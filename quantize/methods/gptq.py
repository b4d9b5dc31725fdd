"""GPTQ (Frantar et al. 2023, arXiv 2210.17323) on the grid of any scalar format, in the spec's own space.

The layer's scale, rotation and rank are those of the recipe's spec; see `quantize.gptq` for the algorithm.
"""

from __future__ import annotations

from typing import Any

from ..compose import BOUNDS, CHOICES, Choices, compress_linear, pick
from ..format import Tensors
from ..method import FloatLayer, Method
from ..spec import LayerSpec
from ..stats import LayerStats
from ..unused import unused_choices


class Gptq(Method):
    defaults = pick("damp", "act_order", "sweeps", "clip", "rounds", rounding="gptq")
    choices, bounds = CHOICES, BOUNDS
    by_rows = True

    def needs(self, params: dict[str, Any]) -> frozenset[str]:
        return Choices.of(params).needs()

    def unused(self, spec: LayerSpec, params: dict[str, Any]) -> frozenset[str]:
        return unused_choices(spec, params)

    def compress(self, layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, **params: Any) -> Tensors:
        return compress_linear(layer, stats, spec, Choices.of(params))


METHOD = Gptq()
