"""The multiple-choice knapsack: one option for each unit, least total error, total cost at most a limit.

    minimise   sum_u sum_c x[u, c] error[u, c]      x[u, c] in {0, 1}
    subject to sum_c x[u, c] = 1 for every unit u,  sum_u sum_c x[u, c] cost[u, c] <= limit

Costs are whole numbers, so a plan meets its limit exactly or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TIME_LIMIT = 30.0  # seconds that the solver may take; then its best choice so far is used and its gap returned
_SCALE = 1e3  # the greedy objective as the solver sees it: its absolute tolerances are 1e-6


@dataclass(frozen=True)
class Option:
    """A spec for all layers of a unit: cost in bytes or nanoseconds, error from 0."""

    spec: str
    cost: int
    error: float


@dataclass(frozen=True)
class Unit:
    """Layers that get one common spec, and the specs they may get."""

    layers: tuple[str, ...]
    options: tuple[Option, ...]


def cheapest(units: Sequence[Unit]) -> list[int]:
    """For each unit the index of its cheapest option, the better one of two equally cheap."""
    return [min(range(len(u.options)), key=lambda i: (u.options[i].cost, u.options[i].error)) for u in units]


def total_cost(units: Sequence[Unit], chosen: Sequence[int]) -> int:
    return sum(u.options[i].cost for u, i in zip(units, chosen, strict=True))


def total_error(units: Sequence[Unit], chosen: Sequence[int]) -> float:
    return math.fsum(u.options[i].error for u, i in zip(units, chosen, strict=True))


def choose_greedily(units: Sequence[Unit], limit: int) -> list[int]:
    """For each unit the index of its option: from the cheapest, always the change with the largest error reduction a
    unit of cost that still fits, until none does."""
    chosen = cheapest(units)
    room = limit - total_cost(units, chosen)
    while True:
        best = (0.0, 0, 0)
        for number, (unit, current) in enumerate(zip(units, chosen, strict=True)):
            now = unit.options[current]
            for index, option in enumerate(unit.options):
                gain, extra = now.error - option.error, option.cost - now.cost
                if gain > 0 and extra <= room:
                    best = max(best, (gain / extra if extra > 0 else math.inf, number, index), key=lambda b: b[0])
        rate, number, index = best
        if rate == 0:
            return chosen
        room -= units[number].options[index].cost - units[number].options[chosen[number]].cost
        chosen[number] = index


def choose_by_milp(units: Sequence[Unit], limit: int, start: Sequence[int]) -> tuple[list[int], float] | None:
    """For each unit the index of its option, and a bound on (error - optimum) / optimum; None when the solver fails.

    start  a choice that fits, such as the greedy one; its error sets the scale of the objective
    Raises ImportError without scipy.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    base = cheapest(units)
    room = limit - total_cost(units, base)
    scale = total_error(units, start)
    if scale <= 0 or room < 0:
        return (list(start), 0.0) if room >= 0 else None
    flat = [(u, i) for u, unit in enumerate(units) for i in range(len(unit.options))]
    extra = [units[u].options[i].cost - units[u].options[base[u]].cost for u, i in flat]
    # in the largest common unit the coefficients are small whole numbers, which the solver's tolerance cannot blur
    unit_cost = math.gcd(*extra) or 1
    rows = csr_array(([1.0] * len(flat), ([u for u, _ in flat], range(len(flat)))), shape=(len(units), len(flat)))
    result: Any = milp(
        np.array([units[u].options[i].error for u, i in flat]) * (_SCALE / scale),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(rows, 1, 1),
            LinearConstraint(np.array([[e / unit_cost for e in extra]]), -np.inf, room // unit_cost),
        ],
        options={"time_limit": TIME_LIMIT, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    chosen, best = [0] * len(units), [-1.0] * len(units)
    for (u, i), x in zip(flat, result.x, strict=True):
        if x > best[u]:
            chosen[u], best[u] = i, x
    if total_cost(units, chosen) > limit:
        return None
    if total_error(units, chosen) > scale:  # stopped by the clock before it reached the start
        chosen = list(start)
    return chosen, _gap(total_error(units, chosen), result, scale)


def _gap(error: float, result: Any, scale: float) -> float:
    """Relative distance of `error` from the bound that the solver proved."""
    bound = (result.mip_dual_bound or 0.0) * scale / _SCALE
    gap = (error - bound) / bound if bound > 0 else (0.0 if error <= 0 else math.inf)
    return 0.0 if gap < 1e-6 else gap
