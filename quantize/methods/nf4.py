"""NF4 in the place of the recipe's 4-bit integers, rounded to nearest: what bitsandbytes does (QLoRA, Dettmers et al.
2023, arXiv 2305.14314). Needs no data; layers of another width keep their format."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..format import Tensors
from ..method import FloatLayer, Method
from ..spec import FormatSpec, LayerSpec
from ..stats import LayerStats


class Nf4(Method):
    adds = frozenset[str]()

    def complete(self, spec: LayerSpec, n: int, k: int, params: dict[str, Any], foldable: bool = False) -> LayerSpec:
        return dataclasses.replace(spec, weight=FormatSpec("nf4", 64)) if spec.weight.format == "int4" else spec

    def formats(self) -> tuple[str, ...]:
        return ("nf4",)

    def compress(self, layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, **params: Any) -> Tensors:
        return spec.weight.resolve().encode(layer.weight, spec.weight)


METHOD = Nf4()
