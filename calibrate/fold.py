"""Folding input scales into the layers that produce those inputs, so that they cost nothing at run time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..quantize.compose import Choices, choose_scale, scaled_stats
from ..quantize.method import FloatLayer
from ..quantize.stats import LayerStats
from ..runtime.family import Fold

if TYPE_CHECKING:
    from .plan import LayerPlan


def apply_fold(layers: Mapping[str, FloatLayer], fold: Fold, scale: Tensor) -> dict[str, FloatLayer]:
    """The layers after folding `scale` float32 [K]: the consumers read `x * scale`, the model computes what it did.

    Only changed layers are returned. The producer of a `plus_one` fold must have a bias.
    """
    producer = layers[fold.producer]
    rows, bias = slice(fold.rows.start, fold.rows.stop), producer.bias
    weight = producer.weight.clone()
    weight[rows] *= scale[:, None]
    bias = None if bias is None else bias.float().clone()
    if bias is not None:
        bias[rows] *= scale
    if fold.plus_one is not None:
        assert bias is not None, f"{fold.producer} needs a bias to fold (1 + scale)"
        ones = slice(fold.plus_one.start, fold.plus_one.stop)
        weight[ones] *= scale[:, None]
        bias[ones] = (bias[ones] + 1) * scale - 1
    changed = {fold.producer: dataclasses.replace(producer, weight=weight, bias=bias)}
    for name in fold.consumers:
        layer = changed.get(name, layers[name])
        changed[name] = dataclasses.replace(layer, weight=layer.weight / scale)
    return changed


def fold_scales(
    layers: dict[str, FloatLayer], stats: dict[str, LayerStats], folds: Sequence[Fold], plans: Mapping[str, LayerPlan]
) -> tuple[dict[str, FloatLayer], dict[str, LayerStats]]:
    """Chooses and folds a scale for each of `folds`; returns the layers and statistics to go on with."""
    layers, stats = dict(layers), dict(stats)
    for fold in folds:
        readers = [layers[name] for name in fold.consumers]
        first = plans[fold.consumers[0]]
        specs = [plans[name].spec for name in fold.consumers]
        choices = Choices.of(first.full_params())
        with torch.no_grad():
            scale = choose_scale(readers, stats[first.name], [s for s in specs if s is not None], choices)
            layers.update(apply_fold(layers, fold, scale))
        scaled: dict[int, LayerStats] = {}
        for name in fold.consumers:
            value = stats[name]
            stats[name] = scaled.setdefault(id(value), scaled_stats(value, scale))
    return layers, stats
