"""Executing a step plan: at some timesteps the same integer weights run with activations in the compute dtype.

The first and last denoising steps decide most of the quality, and cost only their own share of the time. The plan is
data in the artifact, `plans["steps"]`:

    {"full_activation": [[low, high], ...]}     timesteps t with low <= t <= high
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from ..quantize.errors import InputError, unknown
from .linear import CompressedLinear
from .step import timestep_of

PLANS = ("steps", "bits")
"""Kinds of plans in an artifact; "bits" says how the specs were found, and asks for nothing at run time."""


@dataclass(frozen=True)
class StepPlan:
    """Timestep intervals, both ends included, where activations are not quantised."""

    full_activation: tuple[tuple[float, float], ...]

    def is_full(self, timestep: float) -> bool:
        return any(low <= timestep <= high for low, high in self.full_activation)

    def to_dict(self) -> dict[str, Any]:
        return {"full_activation": [list(pair) for pair in self.full_activation]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "plans.steps") -> StepPlan:
        """Raises InputError for an unknown key or an interval that is not two rising numbers."""
        if not isinstance(data, Mapping):
            raise InputError(f"{where}: expected a dict, found {data!r}")
        for key in data:
            if key != "full_activation":
                raise unknown("key", key, ["full_activation"], where)
        pairs = data.get("full_activation", [])
        if not isinstance(pairs, Sequence):
            raise InputError(f"{where}.full_activation: expected a list of [low, high] timesteps, found {pairs!r}")
        for pair in pairs:
            if not _is_interval(pair):
                raise InputError(f"{where}: expected [low, high] timesteps, found {pair}")
        return cls(tuple((float(low), float(high)) for low, high in pairs))


def _is_interval(pair: Any) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(isinstance(end, (int, float)) for end in pair) and pair[0] <= pair[1]


def plan_steps(timesteps: Sequence[float], first: int, last: int, scale: float = 1.0) -> StepPlan:
    """The plan that spares the `first` and `last` steps of a sampler that visits `timesteps` in this order.

    scale  what the denoiser is called with, over the scheduler's timestep (0.001 for FLUX)

    The bounds lie half way to the next step, so that a sampler with a few more or fewer steps is served as well.
    Raises InputError when there are fewer steps than that.
    """
    if first < 0 or last < 0 or first + last > len(timesteps):
        raise InputError(f"--full-steps {first},{last}: expected two counts that fit into {len(timesteps)} steps")
    values = [scale * float(t) for t in timesteps]
    top, bottom = max(values), min(values)
    edges = [(a + b) / 2 for a, b in pairwise(values)]
    pairs = []
    if first:
        pairs.append((edges[first - 1] if first <= len(edges) else bottom, max(top, 1000.0 * scale)))
    if last:
        pairs.append((min(bottom, 0.0), edges[-last] if last <= len(edges) else top))
    return StepPlan(tuple(pairs))


def apply_step_plan(model: nn.Module, plan: StepPlan) -> Any:
    """Makes `model` follow the plan from its next call on; returns a handle whose `remove` ends that."""
    return model.register_forward_pre_hook(_Follow(model, plan), with_kwargs=True)


class _Follow:
    """The hook. A class, so that a copy of the model, or one that was pickled, follows with its own layers."""

    def __init__(self, model: nn.Module, plan: StepPlan) -> None:
        self.plan = plan
        self.layers = [m for m in model.modules() if isinstance(m, CompressedLinear) and m.spec.activation is not None]
        self.plain = {m.spec: dataclasses.replace(m.spec, activation=None) for m in self.layers}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = timestep_of(module, args, kwargs)
        full = timestep is not None and self.plan.is_full(timestep)
        for layer in self.layers:
            layer.active_spec = self.plain[layer.spec] if full else layer.spec


def apply_plans(model: nn.Module, plans: Mapping[str, Any]) -> None:
    """Puts into effect every plan of an artifact that acts at run time, in the place of what the model followed."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Follow):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    if "steps" in plans:
        apply_step_plan(model, StepPlan.from_dict(plans["steps"]))


def check_plans(plans: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a plan that this version does not know, or one that cannot be followed."""
    for name in plans:
        if name not in PLANS:
            raise unknown("plan", name, PLANS, where)
    if "steps" in plans:
        StepPlan.from_dict(plans["steps"], f"{where}.steps")
