"""A scheduler's timesteps, with what some schedulers ask for besides the number of steps: the size of a latent."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..quantize.errors import InputError, reason_of
from ..runtime.family import find_family
from .conditions import given_latent_shape


def set_timesteps(scheduler: Any, steps: int, tokens: int | None = None, sigmas: Sequence[float] | None = None) -> None:
    """Prepares a diffusers scheduler for a run of `steps` steps.

    tokens  length of the image sequence of one latent, which a scheduler with dynamic shifting shifts its timesteps by;
            None: unknown, and then the longest sequence that its config names (for FLUX.1 that of 1024 x 1024 pixels)
    sigmas  noise levels, as `Family.sigmas` names them, for a scheduler that takes them
    Raises InputError when the scheduler does not take that many steps.
    """
    takes, config = inspect.signature(scheduler.set_timesteps).parameters, scheduler.config
    options: dict[str, Any] = {}
    if "mu" in takes and config.get("use_dynamic_shifting"):
        options["mu"] = dynamic_shift(config, tokens)
    flow = type(scheduler).__name__.startswith("FlowMatch")  # others take noise levels in the place of a number alone
    if flow and "sigmas" in takes and sigmas is not None:
        options["sigmas"] = list(sigmas)
    try:
        scheduler.set_timesteps(steps, **options)
    except ValueError as error:
        raise InputError(f"--steps {steps}: {type(scheduler).__name__} does not take it ({reason_of(error)})") from None


def dynamic_shift(config: Any, tokens: int | None) -> float:
    """mu of a scheduler with dynamic shifting: linear in the sequence length, from `base_shift` at
    `base_image_seq_len` tokens to `max_shift` at `max_image_seq_len`."""
    shortest, longest = config.get("base_image_seq_len") or 256, config.get("max_image_seq_len") or 4096
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    length = longest if tokens is None else tokens
    if longest == shortest:
        return float(low)
    return float(low + (high - low) * (length - shortest) / (longest - shortest))


def latent_tokens(model: nn.Module, conditions: str | None = None) -> int | None:
    """Tokens of one latent by the conditions file or else by the model's configuration; None: neither says it.

    Raises InputError for a conditions file that cannot be read.
    """
    shape = None if conditions is None else given_latent_shape(conditions)
    if shape is None:
        try:
            shape = find_family(model).latent_shape(model)
        except NotImplementedError:
            return None
    return count_tokens(shape, model)


def count_tokens(shape: Sequence[int], model: nn.Module) -> int:
    """Tokens that the model cuts a latent of this shape into: [tokens, channels] is cut already, [channels, ...] by the
    configuration's `patch_size`, one number for height and width or one for each dimension."""
    if len(shape) == 2:
        return shape[0]
    config: Any = model.config
    patch = config.get("patch_size") or 1
    return math.prod(shape[1:]) // (math.prod(patch) if isinstance(patch, Sequence) else patch**2)
