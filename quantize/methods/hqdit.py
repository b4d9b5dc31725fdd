"""HQ-DiT (Liu & Zhang 2024, arXiv 2405.19751): floating-point elements of four bits for weights and activations.

    y = Q_fp4(x R) Q_fp4(W R)^T,   R a random block Hadamard

Every output channel of the weight chooses its element, E2M1, E1M2 or E3M0, and the range it covers by the error they
cause (`element = "rule"` gives the paper's closed-form choice), and is rounded with GPTQ on the grid it got.
Activations are E2M1. Differences from the paper, on purpose: a block-diagonal rotation (the widths of a DiT are no
powers of two), and scales that keep the length of what is rounded (`unbiased`; for activations always), because an
error of one direction sums up over a sampler's steps where others cancel.
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


class HqDit(Method):
    """`hadamard` is the largest block to use, 0 for no rotation; `kind` is sylvester or regular."""

    defaults = pick(
        "rounding", "damp", "act_order", "sweeps", "element", "noise", clip="weight", unbiased=True, hadamard=64,
        kind="sylvester",
    )  # fmt: skip
    choices, bounds = CHOICES, BOUNDS
    by_rows = True

    def complete(self, spec: LayerSpec, n: int, k: int, params: dict[str, Any], foldable: bool = False) -> LayerSpec:
        if params["hadamard"] and spec.hadamard is None:
            block = default_block(k, params["kind"], params["hadamard"])
            spec = dataclasses.replace(spec, hadamard=HadamardSpec(block, params["kind"]))
        return spec

    def needs(self, params: dict[str, Any]) -> frozenset[str]:
        return Choices.of(params).needs()

    def unused(self, spec: LayerSpec, params: dict[str, Any]) -> frozenset[str]:
        return unused_choices(spec, params)

    def compress(self, layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, **params: Any) -> Tensors:
        return compress_linear(layer, stats, spec, Choices.of(params))


METHOD = HqDit()
