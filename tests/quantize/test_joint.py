"""Errors that are vectors: the plan of least joint error, which the sum of the errors does not see."""

import dataclasses
import itertools
import sys

import pytest
import torch
from torch import Tensor

from vdit_quant.quantize import joint as module
from vdit_quant.quantize.allocate import Candidate, LayerCandidates, allocate
from vdit_quant.quantize.bit_plan import BitPlan

BITS = (2.25, 3.25, 4.25, 8.0)


def table_of(seed: int, layers: int = 5, common: float = 1.0) -> list[LayerCandidates]:
    """Layers whose effects share a direction, as layers do that all shrink what they pass on."""
    draw = torch.Generator().manual_seed(seed)
    shared, rows = torch.randn(24, generator=draw), []
    for number in range(layers):
        own = torch.randn(len(BITS), 24, generator=draw)
        sign = 1.0 if number % 3 else -1.0
        effects = [2.0**-bits * (sign * common * shared + own[i]) for i, bits in enumerate(BITS)]
        weights = 1024 * (1 + number % 3)
        candidates = tuple(
            Candidate(f"w{i + 2}", int(weights * bits / 8), float(e.double().square().sum()), effect=e)
            for i, (bits, e) in enumerate(zip(BITS, effects, strict=True))
        )
        rows.append(LayerCandidates(f"layer.{number}", weights, candidates))
    return [dataclasses.replace(row, candidates=named(row)) for row in rows]


def named(row: LayerCandidates) -> tuple[Candidate, ...]:
    names = ("w2g64", "w3g64", "w4g64", "w8")
    return tuple(dataclasses.replace(c, spec=name) for c, name in zip(row.candidates, names, strict=True))


def joint_error(table: list[LayerCandidates], plan: BitPlan) -> float:
    effects = [c.effect for row in table for c in row.candidates if c.spec == plan.layers[row.layer]]
    return float(torch.stack([e for e in effects if e is not None]).double().sum(0).square().sum())


def best(table: list[LayerCandidates], limit: int) -> float:
    """Exhaustive search."""
    found = float("inf")
    for chosen in itertools.product(*(row.candidates for row in table)):
        if sum(c.bytes for c in chosen) <= limit:
            total: Tensor = torch.stack([c.effect for c in chosen if c.effect is not None]).double().sum(0)
            found = min(found, float(total.square().sum()))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", ["3bits", "4.5bits"])
def test_the_plan_is_that_of_least_joint_error_and_keeps_the_budget(seed: int, budget: str) -> None:
    table = table_of(seed)
    plan = allocate(table, budget, trust=1)
    limit = int(float(budget.removesuffix("bits")) * sum(row.weights for row in table) / 8)
    assert plan.bytes <= limit
    assert plan.solver == "joint"
    found = joint_error(table, plan)
    assert plan.errors == {"quality": pytest.approx(found)}
    blind = [
        dataclasses.replace(row, candidates=tuple(dataclasses.replace(c, effect=None) for c in row.candidates))
        for row in table
    ]
    assert found <= joint_error(table, allocate(blind, budget))
    assert found <= 1.05 * best(table, limit)


def test_it_is_better_than_the_plan_of_least_sum_where_effects_point_the_same_way() -> None:
    table = table_of(3, layers=24, common=3.0)
    blind = [
        dataclasses.replace(row, candidates=tuple(dataclasses.replace(c, effect=None) for c in row.candidates))
        for row in table
    ]
    joint, additive = allocate(table, "3.5bits", trust=1), allocate(blind, "3.5bits")
    assert additive.solver == "milp"
    assert joint_error(table, joint) < 0.7 * joint_error(table, additive)


def test_tied_layers_count_what_they_change_together() -> None:
    table = [dataclasses.replace(row, tie="pair" if number < 2 else "") for number, row in enumerate(table_of(1))]
    plan = allocate(table, "4bits", trust=1)
    assert plan.layers["layer.0"] == plan.layers["layer.1"]
    assert plan.errors["quality"] == pytest.approx(joint_error(table, plan))


def test_several_groups_have_no_common_unit_and_are_added_up() -> None:
    table = [dataclasses.replace(row, group="ab"[number % 2]) for number, row in enumerate(table_of(1))]
    assert allocate(table, "4bits").solver == "milp"


def test_without_scipy_exchanges_alone_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    table = table_of(2)
    plan = allocate(table, "4bits", trust=1)
    assert plan.solver == "joint"
    assert joint_error(table, plan) < 1.3 * best(table, sum(row.weights for row in table) // 2)


def test_pairs_among_the_promising_options_only_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(5, layers=40)
    whole = joint_error(table, allocate(table, "3.5bits", trust=1))
    monkeypatch.setattr(module, "WIDE", 60)
    assert joint_error(table, allocate(table, "3.5bits", trust=1)) < 1.2 * whole


def test_what_is_not_trusted_does_not_count() -> None:
    table = table_of(3, layers=24, common=3.0)
    plans = [allocate(table, "3.5bits", trust=trust) for trust in (0.0, 0.5, 1.0)]
    assert [plan.solver for plan in plans] == ["milp", "joint", "joint"]
    sums = [sum(c.error for r in table for c in r.candidates if c.spec == p.layers[r.layer]) for p in plans]
    together = [joint_error(table, plan) for plan in plans]
    assert sums[0] <= sums[1] <= sums[2]
    assert together[0] >= together[1] >= together[2]


def test_a_single_option_for_every_layer_is_the_plan() -> None:
    table = [dataclasses.replace(row, candidates=row.candidates[2:3]) for row in table_of(1)]
    assert set(allocate(table, "5bits", trust=1).layers.values()) == {"w4g64"}
