"""Compressing the layers of a plan, one block at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..quantize.errors import InputError
from ..quantize.format import Tensors
from ..quantize.layer import layer_layout
from ..quantize.method import FloatLayer, resolve_method
from ..quantize.stats import LayerStats
from .plan import LayerPlan

GetTensor = Callable[[str], Tensor]


def compress_layer(plan: LayerPlan, get: GetTensor, stats: LayerStats | None, device: torch.device | str) -> Tensors:
    """The stored tensors of one layer, on the CPU. `get` returns the model's tensors by name.

    Raises InputError for a weight that holds NaN or infinity, and RuntimeError when a method breaks its contract.
    """
    assert plan.spec is not None
    weight = get(f"{plan.name}.weight").to(device, torch.float32)
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise InputError(f"layer {plan.name}: {bad} of {weight.numel():,} weights are NaN or infinite")
    method, params = resolve_method(plan.method, plan.params)
    with torch.no_grad():
        tensors = method.compress(FloatLayer(plan.name, weight), stats, plan.spec, **params)
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
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RuntimeError(f"layer {plan.name}: method {plan.method} returned non-finite values in {name}")
