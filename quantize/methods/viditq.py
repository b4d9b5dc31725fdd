"""ViDiT-Q (Zhao et al. 2025, arXiv 2406.02540): dynamic per-token activations and static-dynamic channel balancing.

    x' = (x * s) R,   W' = (W / s) R,   y = Q_token(x') Q(W')^T

The static part is a per-channel scale `s` from calibration (SmoothQuant's formula), the dynamic part a block Hadamard
`R`, which evens out whatever the scale cannot follow as the imbalance changes with the timestep. Weights are rounded
with GPTQ on the statistics of every timestep and both guidance branches (`rounding = "rtn"` gives the paper's own).
Mixed precision (ViDiT-Q-MP) is a plan over such layers: see `quantize.allocate`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..compose import BOUNDS, CHOICES, Choices, compress_linear, pick
from ..format import Tensors
from ..method import FloatLayer, Method
from ..rotate import default_block
from ..spec import HadamardSpec, LayerSpec
from ..stats import LayerStats
from ..unused import unused_choices


class ViditQ(Method):
    """`hadamard` is the largest block to use, 0 for no rotation; `kind` is sylvester or regular. Layers that err less
    without the rotation go without, unless `rotate` is "always"; those that read the same input decide as one.

    The static scale is off by default: beside the rotation and GPTQ it was measured to bring nothing beyond the spread
    between calibration runs. `smooth = "search"` turns it on, for models whose channels differ more.
    """

    defaults = pick(
        "alpha", "aggregate", "fold", "rounding", "damp", "act_order", "sweeps", "clip", hadamard=64, kind="sylvester",
        rotate="search", smooth="none",
    )  # fmt: skip
    choices, bounds = CHOICES, BOUNDS
    by_rows = True

    def complete(self, spec: LayerSpec, n: int, k: int, params: dict[str, Any], foldable: bool = False) -> LayerSpec:
        choices = _choices(params)
        if params["hadamard"] and spec.hadamard is None:
            block = default_block(k, params["kind"], params["hadamard"])
            spec = dataclasses.replace(spec, hadamard=HadamardSpec(block, params["kind"]))
        online = choices.smooth != "none" and not (choices.fold and foldable)
        return dataclasses.replace(spec, pre_scale=spec.pre_scale or online)

    def is_open(self, spec: LayerSpec, params: dict[str, Any]) -> bool:
        return spec.hadamard is not None and _choices(params).rotate == "search"

    def needs(self, params: dict[str, Any]) -> frozenset[str]:
        return _choices(params).needs()

    def unused(self, spec: LayerSpec, params: dict[str, Any]) -> frozenset[str]:
        return unused_choices(spec, params)

    def compress(self, layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, **params: Any) -> Tensors:
        return compress_linear(layer, stats, spec, _choices(params))


def _choices(params: dict[str, Any]) -> Choices:
    """Those of the parameters; where the method rotates nothing there is nothing to search for."""
    return Choices.of(params if params["hadamard"] else {**params, "rotate": "always"})


METHOD = ViditQ()
