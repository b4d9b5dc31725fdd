"""Where a sampling run is: step index, timestep and guidance branch, read off the denoiser's own calls.

Nobody counts calls: a step is a new timestep, a run begins when the timestep goes back or on `reset`. Timesteps fall
along a run, except where a model is told how far it has come (Lumina 2, Z-Image): those that rise twice in a row are
of that kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, main_input

TIMESTEP_NAMES = ("timestep", "timesteps", "t")
MASK_NAME = "encoder_attention_mask"


class StepTracker:
    """Context manager: while it is entered, a hook on `model` keeps the fields below current.

    index     step of the current run, from 0; -1 before the first call
    timestep  value of the current timestep
    repeat    how many calls before this one had the same timestep and latents
    branches  int64 [batch]: guidance branch of each batch row of the current call (0 conditional, 1 unconditional)
    latents   the denoiser's main input of the current call
    text      bool [batch, tokens]: the text tokens that the current call's mask leaves in; None without a mask
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self._falls = True  # which way timesteps go along a run
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
        self.text: Tensor | None = None
        self._went_back = False

    def __enter__(self) -> StepTracker:
        # first in line, so that other hooks on the same module see the current step
        self._handle = self.model.register_forward_pre_hook(self._observe, with_kwargs=True, prepend=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = bind_call(self._signature, args, kwargs)
        before, self.latents = self.latents, main_input(call)
        self.text = text_tokens(call)
        timestep = _first_value(next((call[name] for name in TIMESTEP_NAMES if name in call), None))
        if timestep is not None and timestep == self.timestep:
            # other latents are no second branch: a run of one step, and then the next batch
            self.repeat = self.repeat + 1 if _alike(self.latents, before) else 0
        else:
            self.index = self._next_index(timestep)
            self.repeat, self.timestep = 0, timestep
        batch = 1 if self.latents is None else len(self.latents)
        self.branches = self.family.branches(call, batch, self.repeat)

    def _next_index(self, timestep: float | None) -> int:
        known = self.timestep is not None and timestep is not None
        if not known or (timestep < self.timestep) == self._falls:  # type: ignore[operator]
            self._went_back = False
            return self.index + 1
        if self._went_back:  # again: it was not a new run, and this is its third step
            self._falls, self._went_back = not self._falls, False
            return 2
        self._went_back = True
        return 0


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


def text_tokens(call: Mapping[str, Any]) -> Tensor | None:
    """bool [batch, tokens]: what the mask of a denoiser's call leaves in of its text; None where it has none.

    The mask is [batch, tokens] or [batch, 1, tokens]: 1 and 0, or what is added to attention's logits, 0 and below. A
    row that leaves nothing in leaves everything in: softmax over equal logits does.
    """
    mask = call.get(MASK_NAME)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3) or (mask.dim() == 3 and mask.shape[1] != 1):
        return None
    mask = mask.detach().float().reshape(len(mask), -1)
    kept = mask >= 0 if (mask < 0).any() else mask > 0
    return kept | ~kept.any(1, keepdim=True)


def _alike(now: Tensor | None, before: Tensor | None) -> bool:
    """Whether two calls have the same latents, as far as they are known."""
    if now is None or before is None or now is before:
        return True
    return now.shape == before.shape and now.dtype == before.dtype and torch.equal(now, before)


def _first_value(timestep: Any) -> float | None:
    if isinstance(timestep, Tensor):
        # one for each token (Wan 2.2 from an image): those of the given image are at 0, all others at the step's
        return float(timestep[0].max() if timestep.dim() > 1 else timestep.flatten()[0])
    return None if timestep is None else float(timestep)
