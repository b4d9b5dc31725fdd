"""The knapsack when errors are vectors: what several layers change adds up before it is squared.

    minimise   | sum_u e[u, c_u] |^2      c_u: the option of unit u,      sum_u cost[u, c_u] <= limit

Errors of one direction, such as the shrinking that rounding causes in every layer alike, cost more together than their
sum says, opposite ones less. The square is no linear programme; so a linear one is solved around the plan at hand, as
long as that lowers the square, and then options are changed alone and in pairs until no change helps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .knapsack import Unit, choose_by_milp, choose_greedily, total_cost

ROUNDS = 10  # linear programmes at most
EXCHANGES = 2000  # changes at most
WIDE = 2000  # options that pairs are sought among


class JointError:
    """effects: for each unit float [options, D], what each of its options changes; the error of a choice is the squared
    length of the sum of its effects. trust: what the products of different units count, 1 for all; products measured
    on few samples are noise in part."""

    def __init__(self, units: Sequence[Unit], effects: Sequence[Tensor], trust: float = 1.0) -> None:
        self.units = units
        stacked = torch.cat([e.double() for e in effects])
        own = stacked.square().sum(1)
        self.products = trust * (stacked @ stacked.T)  # [options, options]
        self.products.diagonal().copy_(own)
        sizes = torch.tensor([len(unit.options) for unit in units])
        self.unit = torch.repeat_interleave(torch.arange(len(units)), sizes)  # option -> its unit
        self.first = (sizes.cumsum(0) - sizes).tolist()  # unit -> its first option
        self.cost = torch.tensor([option.cost for unit in units for option in unit.options], dtype=torch.float64)

    def of(self, chosen: Sequence[int]) -> float:
        at = self._options(chosen)
        return float(self.products[at][:, at].sum().clamp_min(0))

    def changes(self, chosen: Sequence[int]) -> Tensor:
        """float64 [options]: the error's change when a unit goes over to this option and all others stay."""
        at = self._options(chosen)
        now = at[self.unit]
        along, own = self.products[:, at].sum(1), self.products.diagonal()
        return 2 * (along - along[now]) + own + own[now] - 2 * self.products[torch.arange(len(now)), now]

    def exchange(self, chosen: Sequence[int], limit: int) -> list[int]:
        """The choice after the best change of one option, or of two at once, as long as one helps and fits."""
        chosen = list(chosen)
        for _ in range(EXCHANGES):
            picked = self._best(chosen, limit)
            if not picked:
                break
            for option in picked:
                chosen[int(self.unit[option])] = option - self.first[int(self.unit[option])]
        return chosen

    def _best(self, chosen: Sequence[int], limit: int) -> list[int]:
        """The options to go over to, none where nothing helps."""
        at = self._options(chosen)
        single, extra = self.changes(chosen), self.cost - self.cost[at][self.unit]
        room, least = limit - float(self.cost[at].sum()), -1e-9 * self.of(chosen)
        alone = torch.where(extra <= room, single, torch.inf)
        some = self._promising(single, extra, at)
        if not len(some):
            return []  # every unit has one option
        now = at[self.unit[some]]
        pairs = self.products[some][:, some] - self.products[some][:, now]
        pairs += self.products[now][:, now] - self.products[now][:, some]
        pairs = single[some][:, None] + single[some] + 2 * pairs
        refused = (self.unit[some][:, None] == self.unit[some]) | (extra[some][:, None] + extra[some] > room)
        pairs[refused] = torch.inf
        if float(alone.min()) <= float(pairs.min()):
            return [int(alone.argmin())] if float(alone.min()) < least else []
        row, column = divmod(int(pairs.argmin()), len(some))
        return [int(some[row]), int(some[column])] if float(pairs.min()) < least else []

    def _promising(self, single: Tensor, extra: Tensor, at: Tensor) -> Tensor:
        """The options that pairs are sought among: all but the ones at hand, or, of very many, those that change the
        error least once their cost counts as it does on average: four times the error for a third less."""
        error, cost = float(self.products[at][:, at].sum().clamp_min(0)), float(self.cost[at].sum())
        value = single + 3 * error / max(cost / 3, 1.0) * extra
        value[at] = torch.inf
        return torch.argsort(value)[: min(WIDE, len(value) - len(at))]

    def _options(self, chosen: Sequence[int]) -> Tensor:
        return torch.tensor([first + c for first, c in zip(self.first, chosen, strict=True)])


def choose_jointly(joint: JointError, limit: int, starts: Sequence[Sequence[int]]) -> list[int]:
    """For each unit the index of its option, from the best of several searches.

    starts  choices that fit
    """
    found = [joint.exchange(_by_programmes(joint, limit, start), limit) for start in starts]
    return min([*found, *map(list, starts)], key=joint.of)


def _by_programmes(joint: JointError, limit: int, chosen: Sequence[int]) -> list[int]:
    """The choice after linear programmes around it, as long as they lower the error; as it is without scipy."""
    chosen = list(chosen)
    for _ in range(ROUNDS):
        changes = joint.changes(chosen)
        units = []
        for unit, first in zip(joint.units, joint.first, strict=True):
            own = changes[first : first + len(unit.options)]
            own = own - own.min()  # errors of a programme are from 0; a constant for each unit changes nothing
            options = [dataclasses.replace(o, error=float(e)) for o, e in zip(unit.options, own, strict=True)]
            units.append(Unit(unit.layers, tuple(options)))
        try:
            found = choose_by_milp(units, limit, choose_greedily(units, limit))
        except ImportError:
            return chosen
        if found is None or total_cost(joint.units, found[0]) > limit or joint.of(found[0]) >= joint.of(chosen):
            return chosen
        chosen = found[0]
    return chosen
