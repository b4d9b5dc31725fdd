"""Embedders that a model repeats in every block, held once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def share_embedders(model: nn.Module) -> None:
    """Makes repeated, bit-equal embedders one module: DiT in diffusers holds the timestep and label embedder once in
    every block."""
    first: dict[str, Any] = {}
    shared = False
    for _, module, embedder in _owners(model):
        known = first.setdefault(type(embedder).__name__, embedder)
        if known is not embedder and _equal(known, embedder):
            module.emb, shared = known, True
    if shared and _write_each not in model._state_dict_hooks.values():
        model._register_state_dict_hook(_write_each)
        model.register_load_state_dict_pre_hook(_part_unlike)


def _owners(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Name of each module that holds an embedder, the module, and its embedder."""
    for name, module in list(model.named_modules()):
        embedder = getattr(module, "emb", None)
        if isinstance(embedder, nn.Module) and any(True for _ in embedder.parameters()):
            yield name, module, embedder


def _part_unlike(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Gives a module an embedder of its own again when another one is about to be loaded into it than into the first
    of those that share it."""
    first: dict[nn.Module, str] = {}
    for name, module, embedder in _owners(model):
        known = first.setdefault(embedder, name)
        names = [(f"{prefix}{known}.emb.{key}", f"{prefix}{name}.emb.{key}") for key in embedder.state_dict()]
        pairs = [(state[one], state[other]) for one, other in names if one in state and other in state]
        if known != name and any(_differ(one, other) for one, other in pairs):
            module.emb = copy.deepcopy(embedder)


def _write_each(model: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """A saved model holds a shared embedder in every block again, as its class expects."""
    seen = set()
    for name, tensor in state.items():
        if (place := (tensor.data_ptr(), tensor.shape)) in seen and tensor.device.type != "meta":
            state[name] = tensor.clone()
        seen.add(place)


def _differ(one: Tensor, other: Tensor) -> bool:
    return not (one.is_meta or other.is_meta or torch.equal(one, other.to(one)))


def _equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[k].device == right[k].device != torch.device("meta")
        and left[k].dtype == right[k].dtype
        and torch.equal(left[k], right[k])
        for k in left
    )
