"""Round to nearest: the honest baseline. `clip` searches the covered range first.

`clip = "weight"` minimises the squared error of the weight, `"output"` weights each column by the mean square of its
input (needs statistics). Neither is the default: weight-error clipping was measured to *cost* quality end to end.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..compose import CHOICES
from ..format import ScalarFormat, Tensors
from ..method import FloatLayer, Method
from ..scale import search_clip
from ..spec import LayerSpec
from ..stats import LayerStats
from ..unused import unused_choices


class RoundToNearest(Method):
    adds = frozenset[str]()
    defaults: ClassVar[dict[str, Any]] = {"clip": "none"}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"clip": CHOICES["clip"]}

    def needs(self, params: dict[str, Any]) -> frozenset[str]:
        return frozenset({"second_moment"}) if params["clip"] == "output" else frozenset()

    def unused(self, spec: LayerSpec, params: dict[str, Any]) -> frozenset[str]:
        return unused_choices(spec, params)

    def compress(self, layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, **params: Any) -> Tensors:
        clip = params.get("clip", "none")
        fmt = spec.weight.resolve()
        if clip == "none" or not isinstance(fmt, ScalarFormat):
            return fmt.encode(layer.weight, spec.weight)
        importance = stats.importance if clip == "output" and stats is not None else None
        scales, _ = search_clip(layer.weight, fmt, spec.weight, importance)
        return fmt.store(fmt.quantize(layer.weight, scales, spec.weight), scales)


METHOD = RoundToNearest()
