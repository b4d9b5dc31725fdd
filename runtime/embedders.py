"""Embedders that a model repeats in every block, held once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def share_embedders(model: nn.Module) -> None:
    """Makes repeated, bit-equal embedders one module: DiT in diffusers holds the timestep and label embedder once in
    every block."""
    first: dict[str, Any] = {}
    shared = False
    for module in list(model.modules()):
        embedder = getattr(module, "emb", None)
        if not isinstance(embedder, nn.Module) or not any(True for _ in embedder.parameters()):
            continue
        known = first.setdefault(type(embedder).__name__, embedder)
        if known is not embedder and _equal(known, embedder):
            module.emb, shared = known, True
    if shared and _write_each not in model._state_dict_hooks.values():
        model._register_state_dict_hook(_write_each)


def _write_each(model: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """A saved model holds a shared embedder in every block again, as its class expects."""
    seen = set()
    for name, tensor in state.items():
        if (place := (tensor.data_ptr(), tensor.shape)) in seen and tensor.device.type != "meta":
            state[name] = tensor.clone()
        seen.add(place)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[k].device == right[k].device != torch.device("meta")
        and left[k].dtype == right[k].dtype
        and torch.equal(left[k], right[k])
        for k in left
    )
