"""SVDQuant (Li et al. 2024, arXiv 2411.05007): a low-rank branch at 16 bits takes what four bits cannot hold.

    y = Q(x' R) Q(W' R - U D R)^T + (x' D^T) U^T + b,   x' = x * s,   W' = W / s

The scale moves the activations' large channels into the weight, the branch takes the weight's dominant directions, and
what is left is small: so are its rounding error and the noise of quantised activations that passes through it. The
branch starts from the truncated SVD of W' (randomised), then rounding the rest and fitting the branch to what rounding
lost alternate, both as the inputs see it. `branch = "error"` starts from the rounding error instead; `noise` counts the
activations' rounding error as part of the inputs. The rotation R is an addition to the paper, and so is GPTQ.

A LoRA adapter (A, B) of the layer joins the branch exactly: D and U get A's rows (times 1 / s) and B's columns. That is
`low_rank.join_adapter`, for a layer that has its tensors already.
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


class SvdQuant(Method):
    """`rank` is the rank of the branch; `hadamard` the largest block of the rotation, 0 for none."""

    defaults = pick(
        "alpha", "aggregate", "fold", "rounding", "damp", "act_order", "sweeps", "clip", "element", "rounds",
        smooth="none", branch="weight", noise=True, unbiased=True, rank=32, hadamard=64, kind="sylvester",
    )  # fmt: skip
    choices, bounds = CHOICES, BOUNDS
    by_rows = True

    def complete(self, spec: LayerSpec, n: int, k: int, params: dict[str, Any], foldable: bool = False) -> LayerSpec:
        choices = Choices.of(params)
        if params["hadamard"] and spec.hadamard is None:
            block = default_block(k, params["kind"], params["hadamard"])
            spec = dataclasses.replace(spec, hadamard=HadamardSpec(block, params["kind"]))
        online = choices.smooth != "none" and not (choices.fold and foldable)
        rank = spec.rank or min(params["rank"], n, k)
        return dataclasses.replace(spec, pre_scale=spec.pre_scale or online, rank=rank)

    def needs(self, params: dict[str, Any]) -> frozenset[str]:
        return Choices.of(params).needs(params["rank"])

    def unused(self, spec: LayerSpec, params: dict[str, Any]) -> frozenset[str]:
        return unused_choices(spec, params)

    def compress(self, layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, **params: Any) -> Tensors:
        return compress_linear(layer, stats, spec, Choices.of(params))


METHOD = SvdQuant()
