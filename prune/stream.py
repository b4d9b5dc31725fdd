"""The training batches of a run: which latents, which noise, which timesteps, all from the seed and the step alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..runtime.family import Family
from .latents import LATENTS, Latents
from .objective import Batch, Objective


def step_generator(seed: int, stage: str, step: int, device: torch.device) -> torch.Generator:
    """The randomness of one step. No state is carried from step to step, so a resumed run repeats nothing and
    skips nothing."""
    # hashed, because a CPU generator looks at the low 32 bits alone
    name = f"{seed} {stage} {step}".encode()
    mixed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
    return torch.Generator(device=device).manual_seed(mixed)


@dataclass(frozen=True)
class Stream:
    """Batches of `batch_size` samples over all processes; process `rank` of `world` gets its share of each.

    The whole batch is drawn everywhere and cut, so the numbers do not depend on how many processes there are.

    drop  share of samples that get the unguided conditions, where there are any
    """

    latents: Latents
    objective: Objective
    family: Family
    batch_size: int
    device: torch.device
    seed: int = 0
    drop: float = 0.1
    rank: int = 0
    world: int = 1

    def whole(self) -> Stream:
        """The stream as a process sees it that is given all of each batch."""
        return replace(self, rank=0, world=1)

    def batch(self, stage: str, step: int) -> Batch:
        """This process's share of the batch of a step."""
        generator = step_generator(self.seed, stage, step, self.device)
        place: dict[str, Any] = {"generator": generator, "device": self.device}
        n = self.batch_size
        index = torch.randint(len(self.latents), (n,), **place)
        u, dropped = torch.rand(n, **place), torch.rand(n, **place) < self.drop
        noise = torch.randn(n, *self.latents.shape, **place)
        mine = self.mine
        return self.make(self.latents.rows(index[mine]), noise[mine], u[mine], dropped[mine])

    @property
    def mine(self) -> slice:
        """Which samples of a batch are this process's."""
        first, end = (rank * self.batch_size // self.world for rank in (self.rank, self.rank + 1))
        return slice(first, end)

    @property
    def share(self) -> float:
        """What this process's mean counts in the mean of all processes', for that to be the mean of the whole batch."""
        return (self.mine.stop - self.mine.start) * self.world / self.batch_size

    def fixed(self, latents: Latents) -> Batch:
        """One batch of all of `latents` with timesteps spread evenly: what losses are compared on."""
        n = len(latents)
        generator = step_generator(self.seed, "validation", 0, torch.device("cpu"))
        noise = torch.randn(n, *latents.shape, generator=generator).to(self.device)
        u = ((torch.arange(n) + 0.5) / n).to(self.device)
        return self.make(latents.rows(torch.arange(n)), noise, u, torch.zeros_like(u, dtype=torch.bool))

    def make(self, rows: dict[str, Tensor], noise: Tensor, u: Tensor, dropped: Tensor) -> Batch:
        rows = {name: t.to(self.device, non_blocking=True) for name, t in rows.items()}
        clean = rows.pop(LATENTS).float()
        for name, value in self.latents.unguided.items():
            mask = dropped.view(-1, *(1 for _ in rows[name].shape[1:]))
            rows[name] = torch.where(mask, value.to(rows[name]), rows[name])
        noised, timestep, target = self.objective.noise(clean, noise, u)
        return Batch(noised, timestep, target, rows, self.family)
