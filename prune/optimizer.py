"""Optimisers, and their state as tensors that safetensors can hold."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.errors import InputError, unknown

NAMES = ("adamw", "adamw8bit")


def check_optimizer(name: str) -> None:
    """Raises InputError for an optimiser that does not exist or cannot be imported."""
    if name not in NAMES:
        raise unknown("optimizer", name, NAMES)
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise InputError("--optimizer adamw8bit needs bitsandbytes; install it with: pip install bitsandbytes")


def make_optimizer(name: str, groups: Sequence[tuple[float, list[nn.Parameter]]]) -> Any:
    """AdamW without weight decay over (learning rate, parameters). Raises InputError as `check_optimizer` does."""
    check_optimizer(name)
    settings: list[dict[str, Any]] = [{"params": parameters, "lr": lr} for lr, parameters in groups]
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(settings, weight_decay=0.0)
    fused = all(p.is_cuda for _, parameters in groups for p in parameters)
    return torch.optim.AdamW(settings, weight_decay=0.0, fused=fused or None)


def pack_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state: tensors by name, and what is no tensor, for JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            kind: dict[str, Any] = tensors if isinstance(value, Tensor) else plain
            kind[f"optimizer.{index}.{key}"] = value
    return tensors, plain


def unpack_state(optimizer: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Puts back what `pack_state` gave."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **plain}.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
