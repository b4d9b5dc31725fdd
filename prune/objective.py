"""What a denoiser is trained on: noised latents and the target that its scheduler's parametrisation asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.errors import InputError
from ..runtime.family import Family

KINDS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Objective:
    """The forward process of a scheduler.

    kind    epsilon: the noise; v_prediction: sqrt(a) noise - sqrt(1 - a) x (Salimans & Ho 2022, arXiv 2202.00512);
            sample: x; flow: noise - x on the straight path (1 - s) x + s noise (Lipman et al. 2023, arXiv 2210.02747)
    alphas  float32 [T], cumulative products a_t; flow: None
    shift   flow: s = shift u / (1 + (shift - 1) u) of uniform u (Esser et al. 2024, arXiv 2403.03206, eq. 23)
    steps   T, the range of the timestep
    scale   what a timestep is multiplied by before the model sees it
    """

    kind: str
    alphas: Tensor | None
    shift: float = 1.0
    steps: int = 1000
    scale: float = 1.0

    def to(self, device: torch.device) -> Objective:
        return self if self.alphas is None else replace(self, alphas=self.alphas.to(device))

    def noise(self, clean: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(noised, timestep, target) of float32 clean and noise [n, ...] and u [n] uniform in 0..1."""
        if self.alphas is None:
            sigma = self.shift * u / (1 + (self.shift - 1) * u)
            s = _column(sigma, clean)
            return (1 - s) * clean + s * noise, sigma * self.steps * self.scale, noise - clean
        index = (u * self.steps).long().clamp_max(self.steps - 1)
        a = _column(self.alphas.to(clean.device)[index], clean)
        noised = a.sqrt() * clean + (1 - a).sqrt() * noise
        targets = {
            "epsilon": lambda: noise,
            "sample": lambda: clean,
            "v_prediction": lambda: a.sqrt() * noise - (1 - a).sqrt() * clean,
        }
        timestep = index if self.scale == 1 else index * self.scale
        return noised, timestep, targets[self.kind]()


@dataclass(frozen=True)
class Batch:
    """One training batch: what the denoiser is called with, and what it should have answered.

    noised float32 [n, ...], timestep [n], target float32 [n, ...], arguments: the model's other call arguments, a row
    for each sample, also where the family has the model called with the first alone
    """

    noised: Tensor
    timestep: Tensor
    target: Tensor
    arguments: dict[str, Tensor]
    family: Family

    def predict(self, model: nn.Module) -> Tensor:
        """The model's answer. It may have more channels than the target: the variance it predicts as well."""
        dtype = next(model.parameters()).dtype
        given = self.family.for_batch(self.arguments)
        arguments = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
        return model(self.noised.to(dtype), timestep=self.timestep, **arguments, return_dict=False)[0]

    def split(self, size: int | None) -> Iterator[tuple[Batch, float]]:
        """Batches of at most `size` samples, each with its share of the whole."""
        n = len(self.noised)
        if size is None or size >= n:
            yield self, 1.0
            return
        for start in range(0, n, size):
            mine = slice(start, start + size)
            arguments = {name: t[mine] for name, t in self.arguments.items()}
            part = Batch(self.noised[mine], self.timestep[mine], self.target[mine], arguments, self.family)
            yield part, len(part.noised) / n

    def error(self, prediction: Tensor) -> Tensor:
        """Mean squared error against the target, float32 scalar: the diffusion loss."""
        mean = prediction[:, : self.target.shape[1]]
        return nn.functional.mse_loss(mean.float(), self.target)


def objective_of(scheduler: Any, family: Family) -> Objective:
    """The objective behind a diffusers scheduler. Raises InputError for one whose parametrisation is not known."""
    config = scheduler.config
    steps = int(config.get("num_train_timesteps", 1000))
    flow = "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
    if flow:
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        return Objective("flow", None, float(shift), steps, family.timestep_scale)
    kind = config.get("prediction_type", "epsilon")
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if kind not in KINDS or alphas is None:
        raise InputError(
            f"{type(scheduler).__name__} with prediction_type '{kind}': no training loss is known for it; "
            f"expected one of {', '.join(KINDS[:3])}, or a flow-matching scheduler"
        )
    return Objective(kind, torch.as_tensor(alphas).float(), 1.0, steps, family.timestep_scale)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in like.shape[1:]))
