"""DiTAS (Dong & Zhang 2025, arXiv 2409.07756): smoothing by temporally aggregated statistics, with a low-rank residual.

    s(alpha) = max_n|W_n|^(1 - alpha) / A^alpha,   A = max over timesteps, tokens and batch of |x|
    alpha    = argmin over a grid of 0, 0.05, ..., 1 of the error of the quantised layer's output
    W / s   ~= Q(W / s - U D) + U D,   by alternating rounding and a rank-r fit

The scale is folded into the adaLN layer (shift rows `W s, b s`; scale rows `W s, (b + 1) s - 1`) or the V rows wherever
the family knows how, and stays online elsewhere. Differences from the released code, on purpose: activations per token
instead of per tensor (a batch must not change a sample), weight groups along the input channels (the released groups
run across output rows and fit no GEMM), one recording run instead of one a layer, and rounding with GPTQ
(`rounding = "rtn"` gives the paper's).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..compose import BOUNDS, CHOICES, Choices, compress_linear, pick
from ..format import Tensors
from ..method import FloatLayer, Method
from ..spec import LayerSpec
from ..stats import LayerStats
from ..unused import unused_choices


class Ditas(Method):
    """`rank` is the rank of the residual branch, 0 for none (32 in the paper)."""

    defaults = pick(
        "aggregate", "alpha", "fold", "rounding", "damp", "act_order", "sweeps", "clip", "rounds", smooth="search",
        rank=32,
    )  # fmt: skip
    choices, bounds = CHOICES, BOUNDS
    by_rows = True

    def complete(self, spec: LayerSpec, n: int, k: int, params: dict[str, Any], foldable: bool = False) -> LayerSpec:
        choices = Choices.of(params)
        online = choices.smooth != "none" and not (choices.fold and foldable)
        rank = spec.rank or min(params["rank"], n, k)
        return dataclasses.replace(spec, pre_scale=spec.pre_scale or online, rank=rank)

    def needs(self, params: dict[str, Any]) -> frozenset[str]:
        return Choices.of(params).needs(params["rank"])

    def unused(self, spec: LayerSpec, params: dict[str, Any]) -> frozenset[str]:
        return unused_choices(spec, params)

    def compress(self, layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, **params: Any) -> Tensors:
        return compress_linear(layer, stats, spec, Choices.of(params))


METHOD = Ditas()
