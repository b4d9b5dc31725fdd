"""Which kernel ops the fused layers of a model run, from its specs: its stages are asked, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from ..kernels.fp8_linear import E4M3
from ..kernels.op import Rehearsal
from .fusion import find_fusion
from .stage import Norm, Stage, Sum

Steps = tuple[tuple[str, ...], ...]
"""Ops in the order they run, and for each step those of which one runs: the block's code says which."""


def fused_ops(model: nn.Module) -> dict[str, Steps]:
    """Full name of each linear layer that a GPU runs fused -> the ops of its stage.

    model   compressed, on the meta device; its layers are stored together by this
    """
    names = {module: name for name, module in model.named_modules()}
    known: dict[Any, Steps] = {}
    found = {}
    for module in model.modules():
        fusion = find_fusion(module)
        if fusion is None or fusion.refusal(module) is not None:
            continue
        for stage in fusion.build(module, cpu=True).stages:
            if stage.refusal() is not None:
                continue
            key = stage.k, *(layer.spec for layer in stage.layers)
            if key not in known:
                known[key] = stage_ops(stage)
            found.update({names[layer]: known[key] for layer in stage.layers})
    return found


def stage_ops(stage: Stage) -> Steps:
    """The ops of one stage whose layers are on the meta device and can be fused."""
    stage.ready()
    x = torch.empty(1, stage.k, dtype=torch.bfloat16, device="meta")
    norm = Norm("layer", 0.0)
    normed, rows = _ops_of(lambda: stage.norm(x, norm))
    acted, _ = _ops_of(lambda: stage.act(x))
    # behind a product in fp8, which stages of fp8 layers are, a norm adds
    summed = _ops_of(lambda: stage.norm_sum(Sum(x, x), norm))[0] if rows.values.dtype == E4M3 else []
    steps = _either(normed, summed, acted)
    split, outputs = _ops_of(lambda: stage.linear(rows))
    if len(stage.places) > 1:
        return steps + _either(split)
    return steps + _either(split, _ops_of(lambda: stage.add(rows, outputs[0]))[0])


def _either(*ways: Iterable[str]) -> Steps:
    return tuple(tuple(dict.fromkeys(op for op in step if op is not None)) for step in zip_longest(*ways))


def _ops_of(call: Callable[[], Any]) -> tuple[list[str], Any]:
    with _Recorder() as recorder:
        result = call()
    return recorder.ops, result


class _Recorder(Rehearsal):
    """Keeps the names of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ops.append(func._schema.name.partition("::")[2])
