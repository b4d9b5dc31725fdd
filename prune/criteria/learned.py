"""TinyFusion (Fang et al. 2024, arXiv 2412.01199): which blocks stay is learned together with a cheap stand-in for the
recovery to come, so that what is optimised is the loss after recovery and not the loss right after pruning.

    min over p, D of E[m ~ p] L(x; W + D, m),   block_i(x) -> m_i block_i(x) + (1 - m_i) x

p is a categorical over the patterns of each N:M group, sampled for each sample by a Gumbel-softmax whose hard choice
passes the soft one's gradient (Jang et al. 2017, arXiv 1611.01144). D is a low-rank update of every linear layer in the
blocks; W does not move. The moving average of the logits decides, D is thrown away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..criterion import Criterion, Study
from ..distill import ask
from ..masking import Adapters, Gates
from ..objective import Batch
from ..patterns import BlockGroup, cut
from ..plan import PrunePlan, StackPlan
from ..trainer import Group, Listener, Moment, Trainer

RANK, ALPHA = 8, 16.0
RATE_GATES, RATE_ADAPTERS = 1e-3, 1e-4
START, SCALING = 0.02, 100.0  # of the logits: equal at first, and moved by whole units by a rate that suits the rest
TAU = (4.0, 0.1)  # temperature at the start and at the end


class Learned(Criterion):
    trains = True

    def choose(self, study: Study, keep: tuple[int, ...]) -> PrunePlan:
        groups = [g for stack, n in zip(study.stacks, keep, strict=True) for g in cut(stack, n, study.groups)]
        search = Search(study, groups)
        with search.gates, search.adapters:
            search.trainer.run(Listener(study.progress))
        with search.trainer.averaged():
            return search.plan()


class Search:
    """The parameters of a search and its loss."""

    def __init__(self, study: Study, groups: list[BlockGroup]) -> None:
        self.study, self.groups = study, groups
        device, seed = study.stream.device, study.stream.seed
        self.options = [group.options().to(device) for group in groups]
        self.logits = [nn.Parameter(torch.full((len(options),), START, device=device)) for options in self.options]
        self.gates = Gates(study.model, study.blocks)
        self.adapters = Adapters(study.model, study.blocks, RANK, ALPHA, seed)
        named = {f"gates.{number}": logits for number, logits in enumerate(self.logits)}
        parameters = [Group(RATE_GATES, named), Group(RATE_ADAPTERS, self.adapters.parameters)]
        place = (study.stream, study.training, {"model": study.model}, study.workspace, study.team)
        self.trainer = Trainer("search", parameters, self.loss, *place)

    def loss(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        self.gates.masks = {}
        with self.adapters.off():
            want = ask(self.study.model, batch) if self.study.distillation.output else None
        tau = TAU[0] + (TAU[1] - TAU[0]) * moment.fraction
        self.gates.masks = self._sample(len(batch.noised), tau, moment.generator)
        out = batch.predict(self.study.model)
        return {**self.study.distillation.mix(batch, out, want), "undecided": self._entropy()}

    def plan(self) -> PrunePlan:
        """The most probable pattern of each group; scores are the probabilities that a block stays."""
        plans = []
        for stack in self.study.stacks:
            kept: list[int] = []
            scores: list[float] = []
            for group, options, p in zip(self.groups, self.options, self._probabilities(), strict=True):
                if group.stack == stack:
                    best = options[int(p.argmax())]
                    kept += [i for i, stays in zip(group.blocks, best.tolist(), strict=True) if stays]
                    scores += [round(s, 4) for s in (p @ options).tolist()]
            plans.append(StackPlan(stack.name, stack.depth_key, stack.depth, tuple(kept), tuple(scores)))
        return PrunePlan(tuple(plans), notes={"groups": [group.name for group in self.groups]})

    def _sample(self, count: int, tau: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Block name -> mask [count] of zeros and ones, each sample's own."""
        masks = {}
        for group, options, logits in zip(self.groups, self.options, self.logits, strict=True):
            u = torch.rand(count, len(options), generator=generator, device=logits.device)
            gumbel = -torch.log(-torch.log(u.clamp(1e-9, 1 - 1e-7)))
            soft = F.softmax((logits * SCALING + gumbel) / tau, -1)
            hard = F.one_hot(soft.argmax(-1), len(options)).float()
            chosen = (hard - soft.detach() + soft) @ options
            masks.update({group.stack.block(i): chosen[:, n] for n, i in enumerate(group.blocks)})
        return masks

    def _probabilities(self) -> list[Tensor]:
        return [F.softmax(logits.detach() * SCALING, -1) for logits in self.logits]

    def _entropy(self) -> Tensor:
        """How undecided the groups are, from 1 (every pattern alike) to 0."""
        open_ = [p for p in self._probabilities() if len(p) > 1]
        if not open_:
            return torch.zeros((), device=self.study.stream.device)
        return torch.stack([-(p * p.clamp_min(1e-12).log()).sum() / math.log(len(p)) for p in open_]).mean()


CRITERION = Learned()
