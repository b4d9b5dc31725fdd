"""Where a sampling run is: step index, timestep and guidance branch, read off the denoiser's own calls.

Nobody counts calls: a step is a new timestep, a run begins when the timestep rises again or on `reset`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


class StepTracker:
    """Context manager: while it is entered, a hook on `model` keeps the fields below current.

    index     step of the current run, from 0; -1 before the first call
    timestep  value of the current timestep
    branches  int64 [batch]: guidance branch of each batch row of the current call (0 conditional, 1 unconditional)
    latents   the denoiser's main input of the current call
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.reset()
        self._signature = signature_of(model)
        self._handle: Any = None

    def reset(self) -> None:
        """The next call begins a new run."""
        self.index = -1
        self.timestep: float | None = None
        self.repeat = 0
        self.branches = torch.zeros(0, dtype=torch.int64)
        self.latents: Tensor | None = None

    def __enter__(self) -> StepTracker:
        # first in line, so that other hooks on the same module see the current step
        self._handle = self.model.register_forward_pre_hook(self._observe, with_kwargs=True, prepend=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = bind_call(self._signature, args, kwargs)
        self.latents = next((v for v in call.values() if isinstance(v, Tensor)), None)
        timestep = _first_value(next((call[name] for name in TIMESTEP_NAMES if name in call), None))
        if timestep is not None and timestep == self.timestep:
            self.repeat += 1
        else:
            rising = self.timestep is not None and timestep is not None and timestep > self.timestep
            self.index = 0 if rising else self.index + 1
            self.repeat, self.timestep = 0, timestep
        batch = 1 if self.latents is None else len(self.latents)
        self.branches = self.family.branches(call, batch, self.repeat)


def signature_of(model: nn.Module) -> inspect.Signature:
    """What the forward of the model's class takes; one that was put in its place may not say."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    own: Any = type(model).forward
    return inspect.signature(model.forward if own is nn.Module.forward else own.__get__(model))


def bind_call(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A denoiser's call arguments by name, those it takes as **kwargs included."""
    call = dict(signature.bind_partial(*args, **kwargs).arguments)
    extra = call.pop("kwargs", None)
    return {**call, **extra} if isinstance(extra, dict) else call


def timestep_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The timestep that a denoiser is being called with: the first of the batch, None where there is none."""
    call = bind_call(signature_of(module), args, kwargs)
    return _first_value(next((call[name] for name in TIMESTEP_NAMES if name in call), None))


def _first_value(timestep: Any) -> float | None:
    if isinstance(timestep, Tensor):
        return float(timestep.flatten()[0])
    return None if timestep is None else float(timestep)
