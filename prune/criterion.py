"""What every pruning criterion is given, and what it returns. A criterion is one file in `criteria/`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..calibrate.progress import Progress
from ..calibrate.workspace import Workspace
from ..quantize import registry
from . import criteria
from .distill import Distillation
from .objective import Batch
from .plan import PrunePlan, Stack, StackPlan
from .stream import Stream
from .team import Team
from .trainer import Training


@dataclass(frozen=True)
class Study:
    """The model in eval mode with its stacks, and what can be measured on it.

    stream     noised latents with their targets
    measured   how many batches a criterion that measures looks at
    training   how a criterion that trains does it, with `distillation` as its loss
    groups     N:M local groups for a search, such as ("1:2",); none: derived from how many blocks are kept
    """

    model: nn.Module
    stacks: tuple[Stack, ...]
    stream: Stream
    workspace: Workspace
    training: Training
    distillation: Distillation = field(default_factory=Distillation)
    measured: int = 8
    groups: tuple[str, ...] = ()
    team: Team = field(default_factory=Team)
    progress: Progress = field(default_factory=Progress)

    @property
    def blocks(self) -> list[str]:
        return [stack.block(i) for stack in self.stacks for i in range(stack.depth)]

    def batches(self) -> Iterator[tuple[Batch, float]]:
        """Batches of at most `training.micro` samples, each with its share of all: the same samples for every
        criterion, on every process."""
        for number in range(self.measured):
            for part, share in self.stream.whole().batch("criterion", number).split(self.training.micro):
                yield part, share / self.measured


class Criterion:
    """Chooses which blocks stay.

    needs_data  whether it runs the model
    trains      whether it takes a training budget
    """

    needs_data = True
    trains = False

    def choose(self, study: Study, keep: tuple[int, ...]) -> PrunePlan:
        """The plan that keeps `keep[i]` blocks of stack i, pinned blocks among them."""
        raise NotImplementedError


class ScoreCriterion(Criterion):
    """A criterion that gives each block a score by itself; the highest stay."""

    def scores(self, study: Study) -> dict[str, float]:
        """Block name -> how much it is worth keeping."""
        raise NotImplementedError

    def choose(self, study: Study, keep: tuple[int, ...]) -> PrunePlan:
        with torch.no_grad():
            scores = self.scores(study)
        plans = []
        for stack, count in zip(study.stacks, keep, strict=True):
            own = tuple(scores[stack.block(i)] for i in range(stack.depth))
            # pinned first, then by score; of equals the earlier
            order = sorted((i not in stack.pinned, -score, i) for i, score in enumerate(own))
            kept = sorted(i for _, _, i in order[:count])
            plans.append(StackPlan(stack.name, stack.depth_key, stack.depth, tuple(kept), own))
        return PrunePlan(tuple(plans))


def find_criterion(name: str) -> Criterion:
    """The criterion of that name. Raises InputError, listing the known ones, when there is none."""
    package: ModuleType = criteria
    found: Any = registry.find(package, name, "CRITERION")
    return found


def criterion_names() -> list[str]:
    return registry.names(criteria)
