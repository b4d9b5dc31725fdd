"""Naming the place where a number stops being finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.errors import InputError


class Diverged(InputError):
    """Training met NaN or infinity. What was learned up to there is kept."""


def first_nonfinite(
    models: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter], run: Callable[[], None]
) -> str:
    """Runs `run` and says what came out first with NaN or infinity in it: the output of a layer of a model, by role
    and name, or, when every output is finite, the gradient of a parameter."""
    seen: list[str] = []
    handles = []

    def watch(label: str) -> Any:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            if not seen and isinstance(output, Tensor) and not torch.isfinite(output).all():
                seen.append(label)

        return look

    for role, model in models.items():
        for name, module in model.named_modules():
            if not list(module.children()):
                handles.append(module.register_forward_hook(watch(f"the output of {role}.{name} is not finite")))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if seen:
        return seen[0]
    for name, parameter in reversed(list(parameters.items())):  # gradients arrive at the last layers first
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name} is not finite"
    return "the loss or its gradient is not finite"
