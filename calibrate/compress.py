"""Compressing the layers of a plan, one block at a time."""

from __future__ import annotations

import dataclasses
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
from .plan import LayerPlan, not_made

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

    Raises InputError for a weight or bias that holds NaN or infinity, and RuntimeError when a method breaks its
    contract.
    """
    names = [plan.name for plan in plans]
    producers = [fold.producer for fold in folds if fold.producer not in names]
    layers = {name: read_layer(name, checkpoint, device) for name in dict.fromkeys([*names, *producers])}
    layers, stats = fold_scales(layers, stats, folds, {plan.name: plan for plan in plans})
    out: Tensors = {}
    done = 0
    for group in together(plans, stats):
        report(group[0], done)
        for plan, tensors in compress_together(group, layers, stats.get(group[0].name)).items():
            out.update({f"{plan}.{key}": t for key, t in tensors.items()})
        done += len(group)
    for fold in folds:
        producer = layers[fold.producer]
        if producer.bias is not None:
            out[f"{fold.producer}.bias"] = producer.bias.float().cpu()
        if fold.producer in producers:
            out[f"{fold.producer}.weight"] = producer.weight.cpu()
    return out


def read_layer(name: str, checkpoint: FloatTensors, device: torch.device | str) -> FloatLayer:
    """The float32 weight and bias of a layer. Raises InputError when one of them holds NaN or infinity."""
    parts = {}
    for part in ("weight", "bias"):
        if part == "weight" or f"{name}.{part}" in checkpoint.headers:
            tensor = parts[part] = checkpoint.get(f"{name}.{part}").to(device, torch.float32)
            if not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise InputError(f"layer {name}: {bad} of {tensor.numel():,} in its {part} are NaN or infinite")
    return FloatLayer(name, parts["weight"], parts.get("bias"))


def together(plans: Sequence[LayerPlan], stats: Mapping[str, LayerStats]) -> list[list[LayerPlan]]:
    """The layers in order; those that one call of their method can compress are one group: they read the same input
    (share one `LayerStats`), get the same spec by the same method, and no row of theirs depends on another."""
    groups: dict[object, list[LayerPlan]] = {}
    for plan in plans:
        key = (id(stats[plan.name]), repr(plan.spec), plan.method, repr(plan.params)) if _by_rows(plan, stats) else None
        groups.setdefault(key or plan.name, []).append(plan)
    return list(groups.values())


def _by_rows(plan: LayerPlan, stats: Mapping[str, LayerStats]) -> bool:
    spec = plan.spec
    if spec is None or plan.name not in stats or spec.pre_scale or spec.rank:
        return False
    return resolve_method(plan.method, {})[0].by_rows and spec.weight.resolve().by_rows


def compress_together(
    group: Sequence[LayerPlan], layers: Mapping[str, FloatLayer], stats: LayerStats | None
) -> dict[str, Tensors]:
    """Layer -> stored tensors, on the CPU, from one call for all rows: GPTQ's factorisation and its loop over columns
    cost the same for the query, key and value of an attention as for one of them."""
    first = group[0]
    if len(group) == 1:
        return {first.name: compress_layer(first, layers[first.name], stats)}
    rows = [plan.n for plan in group]
    stacked = FloatLayer(first.name, torch.cat([layers[plan.name].weight for plan in group]))
    joint = compress_layer(dataclasses.replace(first, n=sum(rows)), stacked, stats)
    assert first.spec is not None
    fmt = first.spec.weight.resolve()
    by_row = fmt.layout(first.n, first.k, first.spec.weight).keys() - set(fmt.shared)  # the rest is of the input
    parts = {name: t.split(rows) if name in by_row else [t] * len(rows) for name, t in joint.items()}
    return {plan.name: {name: t[i].contiguous() for name, t in parts.items()} for i, plan in enumerate(group)}


def compress_layer(plan: LayerPlan, layer: FloatLayer, stats: LayerStats | None) -> Tensors:
    """The stored tensors of one layer, on the CPU."""
    assert plan.spec is not None
    method, params = resolve_method(plan.method, plan.params)
    with torch.no_grad():
        tensors = method.compress(layer, stats, plan.spec, **params)
    _check(plan.settled(tensors), tensors)
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def _check(plan: LayerPlan, tensors: Tensors) -> None:
    assert plan.spec is not None
    expected = {k: (t.shape, t.dtype) for k, t in layer_layout(plan.n, plan.k, plan.spec).items()}
    found = {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise not_made(plan.name, plan.method, missing, plan.spec)
    if expected != found:
        raise RuntimeError(f"layer {plan.name}: method {plan.method} returned {found}, expected {expected}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise RuntimeError(f"layer {plan.name}: method {plan.method} returned non-finite values in {name}")
