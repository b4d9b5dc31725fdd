"""Mixed precision as an integer programme: which spec each layer gets under a budget of bytes, bits or time.

Least sum of the layers' errors within the budget: the multiple-choice knapsack of `knapsack`, solved by HiGHS. (The
programme after MixDQ, Zhao et al. 2024, arXiv 2405.17873; metric groups after ViDiT-Q, Zhao et al. 2024, arXiv
2406.02540.) The sum is a first-order model: each error is measured with every other layer in full precision. Where the
candidates say what they change as vectors, the plan of least sum is where the search for the plan of least joint error
begins: see `joint`.

Groups. Layers of different metric groups have errors in different units. Each group's errors are divided by the sum of
the group's errors with every layer at its cheapest candidate, then multiplied by the group's weight (default 1). So a
group counts its weight at the cheapest plan and 0 at full precision, whatever its metric measures. With one group this
changes no decision.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bit_plan import BitPlan
from .errors import InputError, unknown
from .joint import JointError, choose_jointly
from .knapsack import Option, Unit, cheapest, choose_by_milp, choose_greedily, total_cost, total_error

QUALITY = "quality"
TRUST = 0.5
EXAMPLES = '"2.5x", "4.5bits", "120MB", "1.2GB" or "3.2ms"'

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_NANOSECONDS = 1e6  # in a millisecond: costs are whole numbers, bytes or nanoseconds
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer: the spec's short name, its bytes with every scale, what it costs in quality (a finite
    number from 0, in the unit of the layer's group), and, where it was measured, its time in milliseconds.

    effect  float [D]: what it changes at the model's output; its squared length is the error. Effects of several layers
            add up. None: only the error is known
    """

    spec: str
    bytes: int
    error: float
    ms: float | None = None
    effect: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class LayerCandidates:
    """A layer of `weights` elements and its candidates. Layers with the same non-empty `tie` get one common spec."""

    layer: str
    weights: int
    candidates: tuple[Candidate, ...]
    group: str = QUALITY
    tie: str = ""


@dataclass(frozen=True)
class Budget:
    """A bound on what all allocated layers cost together. `unit`: x (compression against 16 bits a weight), bits
    (average bits a weight, every scale included), bytes or ms."""

    amount: float
    unit: str
    text: str

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """Reads "2.5x", "4.5bits", "120MB", "1.2GB" (powers of 1000; MiB and GiB of 1024) or "3.2ms"; a bare number
        is bits. Raises InputError with valid examples for anything else."""
        shown = f"{text:g}bits" if isinstance(text, (int, float)) else str(text).strip()
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(x|bits?|[kmg]i?b|ms)?", shown.lower())
        amount = float(match[1]) if match else 0.0
        if match is None or not 0 < amount < math.inf:
            raise InputError(f"budget '{text}': cannot be read; expected something like {EXAMPLES}")
        unit = match[2] or "bits"
        if unit in _UNITS:
            return cls(amount * _UNITS[unit], "bytes", shown)
        return cls(amount, "bits" if unit.startswith("bit") else unit, shown)

    def limit(self, table: Sequence[LayerCandidates]) -> int:
        """The largest total cost allowed, in whole bytes or nanoseconds."""
        if self.unit == "ms":
            return math.floor(self.amount * _NANOSECONDS)
        weights = sum(row.weights for row in table)
        size = {"x": 2 * weights / self.amount, "bits": self.amount * weights / 8, "bytes": self.amount}[self.unit]
        return math.floor(size * (1 + 1e-12))

    def cost(self, candidate: Candidate, layer: str = "") -> int:
        """Bytes or nanoseconds. Raises InputError when the budget is a time and none was measured."""
        if self.unit != "ms":
            return candidate.bytes
        if candidate.ms is None:
            raise InputError(
                f"budget '{self.text}': layer {layer}: no time was measured for {candidate.spec}; "
                'give a size, such as "2.5x", "4.5bits" or "120MB"'
            )
        return math.ceil(candidate.ms * _NANOSECONDS)

    def show(self, cost: int, table: Sequence[LayerCandidates]) -> str:
        """A cost in the budget's own unit, rounded up, so that what is shown can be asked for."""
        if self.unit == "ms":
            return f"{math.ceil(cost / _NANOSECONDS * 1e4) / 1e4:.4f}".rstrip("0").rstrip(".") + "ms"
        weights = sum(row.weights for row in table)
        if self.unit == "x":
            return f"{math.floor(2 * weights / cost * 1e4) / 1e4:g}x"
        if self.unit == "bits":
            return f"{math.ceil(8 * cost / weights * 1e4) / 1e4:g}bits"
        return f"{math.ceil(cost / 1e3) / 1e3:.3f}MB"


def allocate(
    table: Sequence[LayerCandidates],
    budget: Budget | str | float,
    weights: Mapping[str, float] | None = None,
    trust: float = TRUST,
) -> BitPlan:
    """The plan of least error within the budget.

    weights  group -> how much it counts (default 1)
    trust    what the products of different layers' effects count, from 0 to 1

    The error is that of the sum of all effects, where every candidate has one and there is one group; else, or with a
    trust of 0, the sum of the errors. Without scipy, or where the solver fails, the search begins at the greedy plan,
    with a logged warning; the plan records what it is.
    Raises InputError for an unreadable budget, one below the cheapest plan (naming that), a time budget without
    measured times, errors that are not finite numbers from 0, tied layers without a common spec, or an unknown group.
    """
    budget, units, limit = _problem(table, budget, weights)
    chosen = choose_greedily(units, limit)
    try:
        found = choose_by_milp(units, limit, chosen)
        reason = "the solver found no bit plan"
    except ImportError:
        found, reason = None, "scipy is not installed"
    if found is None:
        _log.warning("%s: a greedy bit plan is used, which may not be the best one", reason)
    effects = _effects(table, units) if trust else None
    if effects is not None:
        joint = JointError(units, effects, trust)
        return _joint_plan(table, joint, budget, limit, [cheapest(units), chosen, *([found[0]] if found else [])])
    if found is None:
        return _plan(table, units, chosen, budget)
    return dataclasses.replace(_plan(table, units, found[0], budget), solver="milp", gap=found[1])


def _joint_plan(
    table: Sequence[LayerCandidates], joint: JointError, budget: Budget, limit: int, starts: list[list[int]]
) -> BitPlan:
    chosen = choose_jointly(joint, limit, starts)
    error, plan = joint.of(chosen), _plan(table, joint.units, chosen, budget)
    scale = plan.error / (sum(plan.errors.values()) or 1.0)
    return dataclasses.replace(plan, solver="joint", error=error * scale, errors={table[0].group: error})


def greedy(
    table: Sequence[LayerCandidates], budget: Budget | str | float, weights: Mapping[str, float] | None = None
) -> BitPlan:
    """A plan by upgrading the cheapest one, always by the change with the best error reduction a byte that fits.
    Raises InputError as `allocate` does."""
    budget, units, limit = _problem(table, budget, weights)
    return _plan(table, units, choose_greedily(units, limit), budget)


def uniform(
    table: Sequence[LayerCandidates], budget: Budget | str | float, weights: Mapping[str, float] | None = None
) -> BitPlan:
    """The best plan with one spec for all layers of a kind; of a kind are layers offered the same specs. With the same
    candidates everywhere: the best single candidate that fits. Raises InputError as `allocate` does."""
    kinds = [" ".join(sorted(c.spec for c in row.candidates)) for row in table]
    tied = [dataclasses.replace(row, tie=kind) for row, kind in zip(table, kinds, strict=True)]
    return allocate(tied, budget, weights)


def _problem(
    table: Sequence[LayerCandidates], budget: Budget | str | float, weights: Mapping[str, float] | None
) -> tuple[Budget, list[Unit], int]:
    """The budget read, the units to choose for, and the limit in whole bytes or nanoseconds."""
    budget = budget if isinstance(budget, Budget) else Budget.parse(budget)
    _check(table)
    shares = _shares(table, budget, weights or {})
    members: dict[str, list[LayerCandidates]] = {}
    for number, row in enumerate(table):
        members.setdefault(f"tie {row.tie}" if row.tie else f"layer {number}", []).append(row)
    units = [_unit(rows, budget, shares) for rows in members.values()]
    limit, least = budget.limit(table), total_cost(units, cheapest(units))
    if least > limit:
        raise InputError(
            f"budget '{budget.text}': cannot be met; with every layer at its cheapest candidate these "
            f"{len(table)} layers come to {budget.show(least, table)}"
        )
    return budget, units, limit


def _check(table: Sequence[LayerCandidates]) -> None:
    if not table:
        raise InputError("bit plan: there are no layers to allocate")
    if len({row.layer for row in table}) < len(table):
        raise InputError("bit plan: a layer is listed twice")
    for row in table:
        if not row.candidates:
            raise InputError(f"layer {row.layer}: has no candidate")
        for candidate in row.candidates:
            if not (math.isfinite(candidate.error) and candidate.error >= 0):
                raise InputError(
                    f"layer {row.layer} as {candidate.spec}: expected an error that is a finite number from 0, "
                    f"found {candidate.error}"
                )


def _shares(table: Sequence[LayerCandidates], budget: Budget, weights: Mapping[str, float]) -> dict[str, float]:
    """group -> what its errors are multiplied by: its weight over its error at the cheapest candidates."""
    totals: dict[str, float] = {}
    for row in table:
        least = min(row.candidates, key=lambda c: (budget.cost(c, row.layer), c.error))
        totals[row.group] = totals.get(row.group, 0.0) + least.error
    for group, weight in weights.items():
        if group not in totals:
            raise unknown("metric group", group, totals, "bit plan")
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"metric group {group}: expected a weight from 0, found {weight}")
    return {group: weights.get(group, 1.0) / (total or 1.0) for group, total in totals.items()}


def _unit(rows: Sequence[LayerCandidates], budget: Budget, shares: Mapping[str, float]) -> Unit:
    """The rows as one unit, offered the specs that they all are offered. Raises InputError when there is none."""
    held = [{c.spec: c for c in row.candidates} for row in rows]
    names = [name for name in held[0] if all(name in other for other in held)]
    if not names:
        raise InputError(f"layers {', '.join(row.layer for row in rows)}: tied, but they have no candidate in common")
    options = tuple(
        Option(
            name,
            sum(budget.cost(own[name], row.layer) for row, own in zip(rows, held, strict=True)),
            math.fsum(shares[row.group] * own[name].error for row, own in zip(rows, held, strict=True)),
        )
        for name in names
    )
    return Unit(tuple(row.layer for row in rows), options)


def _effects(table: Sequence[LayerCandidates], units: Sequence[Unit]) -> list[Tensor] | None:
    """For each unit float [options, D]: the summed effects of its layers; None where they are not known, or there are
    several groups, whose errors have no common unit."""
    if len({row.group for row in table}) > 1 or any(c.effect is None for row in table for c in row.candidates):
        return None
    held = {(row.layer, c.spec): c.effect for row in table for c in row.candidates if c.effect is not None}
    return [
        torch.stack([torch.stack([held[layer, o.spec] for layer in unit.layers]).sum(0) for o in unit.options])
        for unit in units
    ]


def _plan(table: Sequence[LayerCandidates], units: Sequence[Unit], chosen: Sequence[int], budget: Budget) -> BitPlan:
    picked = {layer: u.options[i].spec for u, i in zip(units, chosen, strict=True) for layer in u.layers}
    used = {row.layer: next(c for c in row.candidates if c.spec == picked[row.layer]) for row in table}
    errors: dict[str, float] = {}
    for row in table:
        errors[row.group] = errors.get(row.group, 0.0) + used[row.layer].error
    size, times = sum(c.bytes for c in used.values()), [c.ms for c in used.values()]
    return BitPlan(
        layers={row.layer: picked[row.layer] for row in table},
        budget=budget.text,
        bytes=size,
        bits=8 * size / sum(row.weights for row in table),
        error=total_error(units, chosen),
        errors=errors,
        ms=None if None in times else math.fsum(t for t in times if t is not None),
        solver="greedy",
    )
