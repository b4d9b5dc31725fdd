"""The bit plan is the best one, keeps its budget, and says plainly when it cannot."""

import itertools
import json
import logging
import random
import re
import sys

import pytest

from vdit_quant.quantize import allocate as allocation
from vdit_quant.quantize.allocate import Budget, Candidate, LayerCandidates, allocate, greedy, uniform
from vdit_quant.quantize.bit_plan import BitPlan
from vdit_quant.quantize.errors import InputError

NAMES = ("w4", "w4g64", "w8", "w16")
BITS = (4.0, 4.25, 8.25, 16.0)


def random_table(
    seed: int, layers: int = 5, options: int = 4, groups: tuple[str, ...] = ("quality",)
) -> list[LayerCandidates]:
    """Layers whose candidates cost more and mostly err less, with the odd one that is worse than a cheaper one."""
    draw = random.Random(seed)
    rows = []
    for number in range(layers):
        weights = draw.choice((64, 256, 1024)) * 64
        sensitivity = 10 ** draw.uniform(-5, -1)
        candidates = tuple(
            Candidate(name, int(weights * bits / 8), sensitivity * 4.0**-bits * 256 * draw.uniform(0.3, 3))
            for name, bits in zip(NAMES[:options], BITS, strict=False)
        )
        rows.append(LayerCandidates(f"layer.{number}", weights, candidates, draw.choice(groups)))
    return rows


def cost(table: list[LayerCandidates], names: tuple[str, ...]) -> int:
    return sum(c.bytes for row, name in zip(table, names, strict=True) for c in row.candidates if c.spec == name)


def error(table: list[LayerCandidates], names: tuple[str, ...], shares: dict[str, float]) -> float:
    pairs = zip(table, names, strict=True)
    return sum(shares[row.group] * c.error for row, name in pairs for c in row.candidates if c.spec == name)


def shares(table: list[LayerCandidates], weights: dict[str, float]) -> dict[str, float]:
    total = {group: 0.0 for group in {row.group for row in table}}
    for row in table:
        total[row.group] += min(row.candidates, key=lambda c: (c.bytes, c.error)).error
    return {group: weights.get(group, 1.0) / value for group, value in total.items()}


def best_error(table: list[LayerCandidates], limit: int, scale: dict[str, float]) -> float:
    """Exhaustive search."""
    plans = itertools.product(*([c.spec for c in row.candidates] for row in table))
    return min(error(table, names, scale) for names in plans if cost(table, names) <= limit)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", ["4.1bits", "5.3bits", "7.5bits", "2.2x"])
def test_the_plan_is_the_best_of_all_plans_and_never_worse_than_the_greedy_one(seed: int, budget: str) -> None:
    weights = {"quality": 1.0, "alignment": 2.5}
    table = random_table(seed, groups=("quality", "alignment"))
    weights = {group: weights[group] for group in {row.group for row in table}}
    limit = Budget.parse(budget).limit(table)
    best = best_error(table, limit, shares(table, weights))
    plan, fallback = allocate(table, budget, weights), greedy(table, budget, weights)
    assert plan.solver == "milp"
    assert plan.gap == 0.0
    assert plan.error == pytest.approx(best, rel=1e-6)
    assert plan.error <= fallback.error * (1 + 1e-9)
    for found in (plan, fallback):
        assert found.bytes <= limit
        assert found.bytes == cost(table, tuple(found.layers.values()))
        assert found.error == pytest.approx(error(table, tuple(found.layers.values()), shares(table, weights)))


@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_ordinary_size_is_solved_to_the_optimum_within_its_budget(seed: int) -> None:
    table = random_table(seed, layers=200)
    limit = Budget.parse("5.5bits").limit(table)
    plan = allocate(table, "5.5bits")
    assert plan.gap == 0.0
    assert 0.999 * limit < plan.bytes <= limit
    assert plan.error <= greedy(table, "5.5bits").error <= uniform(table, "5.5bits").error


def test_a_budget_that_is_exactly_the_cheapest_plan_is_met() -> None:
    table = random_table(1)
    least = sum(min(c.bytes for c in row.candidates) for row in table)
    assert allocate(table, f"{least / 1e3}kB").bytes == least
    assert set(allocate(table, "100bits").layers.values()) != {"w4"}


def test_a_budget_below_the_cheapest_plan_names_one_that_works() -> None:
    table = random_table(2)
    for budget in ("2bits", "9x", "1kB"):
        with pytest.raises(InputError, match="cannot be met") as caught:
            allocate(table, budget)
        reachable = str(caught.value).rsplit(" ", 1)[1]
        assert allocate(table, reachable).layers == {row.layer: "w4" for row in table}


def test_tied_layers_get_one_spec_and_the_plan_is_the_best_of_those() -> None:
    table = random_table(3, layers=6)
    table = [LayerCandidates(r.layer, r.weights, r.candidates, tie="qkv" if i < 3 else "") for i, r in enumerate(table)]
    limit, scale = Budget.parse("5.5bits").limit(table), shares(table, {})
    plans = itertools.product(NAMES, repeat=4)
    tied = [(head, head, head, *rest) for head, *rest in plans]
    best = min(error(table, names, scale) for names in tied if cost(table, names) <= limit)
    plan = allocate(table, "5.5bits")
    assert len({plan.layers[f"layer.{i}"] for i in range(3)}) == 1
    assert plan.error == pytest.approx(best, rel=1e-6)


def test_tied_layers_may_differ_in_what_they_are_offered_but_need_something_in_common() -> None:
    a = LayerCandidates("a", 64, (Candidate("w4", 32, 1.0), Candidate("w8", 64, 0.1)), tie="t")
    b = LayerCandidates("b", 64, (Candidate("w8", 64, 0.2), Candidate("w16", 128, 0.0)), tie="t")
    assert allocate([a, b], "16bits").layers == {"a": "w8", "b": "w8"}
    c = LayerCandidates("c", 64, (Candidate("w16", 128, 0.0),), tie="t")
    with pytest.raises(InputError, match="no candidate in common"):
        allocate([a, b, c], "16bits")


def test_the_uniform_plan_is_the_best_single_spec_that_fits() -> None:
    table = random_table(4)
    plan = uniform(table, "9bits")
    fitting = [n for n in NAMES if cost(table, (n,) * len(table)) <= Budget.parse("9bits").limit(table)]
    best = min(fitting, key=lambda n: error(table, (n,) * len(table), shares(table, {})))
    assert set(plan.layers.values()) == {best}
    weight_only = LayerCandidates("norm", 64, (Candidate("w8", 64, 0.0),))
    assert set(uniform([*table, weight_only], "9bits").layers.values()) == {best, "w8"}


def test_groups_of_other_units_count_by_their_weight_and_not_by_their_unit() -> None:
    def row(name: str, group: str, unit: float) -> LayerCandidates:
        return LayerCandidates(name, 64, (Candidate("w4", 32, unit), Candidate("w8", 64, unit / 10)), group)

    table = [row("a", "quality", 1e-6), row("b", "alignment", 1e3)]
    assert allocate(table, "6bits", {"quality": 2.0}).layers == {"a": "w8", "b": "w4"}
    assert allocate(table, "6bits", {"alignment": 2.0}).layers == {"a": "w4", "b": "w8"}
    plan = allocate(table, "4bits")
    assert plan.error == pytest.approx(2.0)
    assert plan.errors == {"quality": pytest.approx(1e-6), "alignment": pytest.approx(1e3)}
    with pytest.raises(InputError, match="unknown metric group 'qualty'; did you mean 'quality'"):
        allocate(table, "6bits", {"qualty": 2.0})


def test_a_time_budget_needs_measured_times() -> None:
    table = [LayerCandidates("a", 64, (Candidate("w4", 32, 1.0, 0.5), Candidate("w8", 64, 0.1, 0.25)))]
    plan = allocate(table, "0.4ms")
    assert (plan.layers, plan.ms) == ({"a": "w8"}, 0.25)
    with pytest.raises(InputError, match=r"come to 0\.25ms"):
        allocate(table, "0.2ms")
    with pytest.raises(InputError, match=r"no time was measured.*2\.5x"):
        allocate(random_table(0), "3.2ms")


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("2.5x", "x", 2.5),
        ("4.5bits", "bits", 4.5),
        (" 4 bit ", "bits", 4.0),
        ("4.25", "bits", 4.25),
        (4.25, "bits", 4.25),
        ("120MB", "bytes", 120e6),
        ("1.2 GB", "bytes", 1.2e9),
        ("2MiB", "bytes", 2 * 2**20),
        ("3.2ms", "ms", 3.2),
    ],
)
def test_budgets_are_read(text: str | float, unit: str, amount: float) -> None:
    budget = Budget.parse(text)
    assert (budget.unit, budget.amount) == (unit, amount)
    assert Budget.parse(budget.text) == budget


@pytest.mark.parametrize("text", ["", "x", "four bits", "4.5 bytes", "-3x", "0x", "0MB", "4,5bits", "1e3MB", "nan"])
def test_a_budget_that_cannot_be_read_shows_ones_that_can(text: str) -> None:
    with pytest.raises(InputError, match=r"expected something like \"2\.5x\", \"4\.5bits\""):
        Budget.parse(text)


@pytest.mark.parametrize("ms", [0.12345, 9.99999, 123.45678, 220.68301, 4321.00001])
def test_the_least_time_that_is_shown_can_be_asked_for(ms: float) -> None:
    table = [LayerCandidates("a", 64, (Candidate("w4", 32, 1.0, ms=ms),))]
    with pytest.raises(InputError, match="cannot be met") as caught:
        allocate(table, "0.01ms")
    (least,) = re.findall(r"come to ([\d.]+ms)", str(caught.value))
    assert allocate(table, least).layers["a"] == "w4"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_error_that_is_no_error_is_refused_with_the_layer(value: float) -> None:
    with pytest.raises(InputError, match="layer a as w4: expected an error"):
        allocate([LayerCandidates("a", 64, (Candidate("w4", 32, value),))], "8bits")


def test_a_table_that_is_no_table_is_refused() -> None:
    one = LayerCandidates("a", 64, (Candidate("w4", 32, 1.0),))
    for table, message in (
        ([], "no layers"),
        ([one, one], "twice"),
        ([LayerCandidates("a", 64, ())], "has no candidate"),
    ):
        with pytest.raises(InputError, match=message):
            allocate(table, "8bits")


def test_without_scipy_the_plan_is_greedy_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = random_table(5)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with caplog.at_level(logging.WARNING):
        plan = allocate(table, "6bits")
    assert "scipy" in caplog.text
    assert (plan.solver, plan.gap) == ("greedy", None)
    assert plan == greedy(table, "6bits")


def test_a_solver_that_fails_leaves_the_greedy_plan(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(allocation, "choose_by_milp", lambda *_: None)
    assert allocate(random_table(5), "6bits").solver == "greedy"
    assert "greedy" in caplog.text


def test_layers_without_any_error_cost_as_little_as_they_can() -> None:
    table = [LayerCandidates("a", 64, (Candidate("w8", 64, 0.0), Candidate("w4", 32, 0.0)))]
    plan = allocate(table, "16bits")
    assert (plan.layers, plan.error, plan.gap) == ({"a": "w4"}, 0.0, 0.0)


def test_a_plan_survives_json_and_refuses_what_it_does_not_know() -> None:
    plan = allocate(random_table(6), "6bits")
    data = json.loads(json.dumps(plan.to_dict()))
    assert BitPlan.from_dict(data) == plan
    assert plan.spec_of("layer.0").name == plan.layers["layer.0"]
    for change, message in (
        ({"solvr": "milp"}, "unknown key 'solvr'; did you mean 'solver'"),
        ({"solver": "guess"}, "unknown solver 'guess'"),
        ({"bytes": "many"}, "expected 'bytes' as int"),
        ({"layers": {"a": "w5x"}}, "spec 'w5x': unknown format '5x'"),
    ):
        with pytest.raises(InputError, match=message):
            BitPlan.from_dict({**data, **change})
    with pytest.raises(InputError, match="'budget'"):
        BitPlan.from_dict({k: v for k, v in data.items() if k != "budget"})
    with pytest.raises(InputError, match=r"unknown layer 'layer\.9'"):
        plan.spec_of("layer.9")
