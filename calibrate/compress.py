"""Compressing the layers of a plan, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..quantize.errors import InputError
from ..quantize.format import Tensors
from ..quantize.layer import layer_layout
from ..quantize.method import FloatLayer, resolve_method
from ..quantize.stats import LayerStats
from ..runtime.family import Fold
from .fold import fold_scales
from .plan import LayerPlan

Report = Callable[[LayerPlan, int], None]


class FloatTensors(Protocol):
    """Where the float tensors of the model come from: a checkpoint on disk or a model in memory."""

    @property
    def headers(self) -> Mapping[str, object]: ...

    def get(self, name: str) -> Tensor: ...


def compress_unit(
    plans: Sequence[LayerPlan],
    folds: Sequence[Fold],
    checkpoint: FloatTensors,
    stats: dict[str, LayerStats],
    device: torch.device | str,
    report: Report = lambda plan, offset: None,
) -> Tensors:
    """The stored tensors of one block's layers by full name, on the CPU: scales folded first, then layer by layer.

    Raises InputError for a weight that holds NaN or infinity, and RuntimeError when a method breaks its contract.
    """
    names = [plan.name for plan in plans]
    producers = [fold.producer for fold in folds if fold.producer not in names]
    layers = {name: read_layer(name, checkpoint, device) for name in dict.fromkeys([*names, *producers])}
    layers, stats = fold_scales(layers, stats, folds, {plan.name: plan for plan in plans})
    out: Tensors = {}
    for offset, plan in enumerate(plans):
        report(plan, offset)
        tensors = compress_layer(plan, layers[plan.name], stats.get(plan.name))
        out.update({f"{plan.name}.{key}": t for key, t in tensors.items()})
    for fold in folds:
        producer = layers[fold.producer]
        if producer.bias is not None:
            out[f"{fold.producer}.bias"] = producer.bias.float().cpu()
        if fold.producer in producers:
            out[f"{fold.producer}.weight"] = producer.weight.cpu()
    return out


def read_layer(name: str, checkpoint: FloatTensors, device: torch.device | str) -> FloatLayer:
    """The float32 weight and bias of a layer. Raises InputError when the weight holds NaN or infinity."""
    weight = checkpoint.get(f"{name}.weight").to(device, torch.float32)
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise InputError(f"layer {name}: {bad} of {weight.numel():,} weights are NaN or infinite")
    has_bias = f"{name}.bias" in checkpoint.headers
    return FloatLayer(name, weight, checkpoint.get(f"{name}.bias").to(device, torch.float32) if has_bias else None)


def compress_layer(plan: LayerPlan, layer: FloatLayer, stats: LayerStats | None) -> Tensors:
    """The stored tensors of one layer, on the CPU."""
    assert plan.spec is not None
    method, params = resolve_method(plan.method, plan.params)
    with torch.no_grad():
        tensors = method.compress(layer, stats, plan.spec, **params)
    _check(plan, tensors)
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def _check(plan: LayerPlan, tensors: Tensors) -> None:
    assert plan.spec is not None
    expected = {k: (t.shape, t.dtype) for k, t in layer_layout(plan.n, plan.k, plan.spec).items()}
    found = {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise InputError(
            f"layer {plan.name}: method {plan.method} makes no {', '.join(missing)}, which the spec {plan.spec.name} "
            "asks for; choose another method or another spec"
        )
    if expected != found:
        raise RuntimeError(f"layer {plan.name}: method {plan.method} returned {found}, expected {expected}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise RuntimeError(f"layer {plan.name}: method {plan.method} returned non-finite values in {name}")
