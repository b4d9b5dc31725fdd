"""Plans: what they hold, what they refuse, and which blocks answer for which."""

import json
from typing import Any

import pytest

from vdit_quant.prune.plan import PrunePlan, Stack, StackPlan, parse_keep
from vdit_quant.quantize.errors import InputError

ONE = (Stack("transformer_blocks", "num_layers", 12),)
TWO = (Stack("transformer_blocks", "num_layers", 19), Stack("single_transformer_blocks", "num_single_layers", 38))


def _plan(kept: tuple[int, ...], depth: int, scores: tuple[float, ...] = ()) -> PrunePlan:
    return PrunePlan((StackPlan("blocks", "num_layers", depth, kept, scores),), "even", {"groups": ["1:2"]})


def test_a_plan_survives_json() -> None:
    plan = _plan((0, 2, 3), 4, (0.5, 0.25, 1.0, 2.0))
    again = PrunePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.notes == plan.notes


@pytest.mark.parametrize("kept", [(), (1, 0), (0, 0), (0, 4), (-1, 2)])
def test_a_plan_holds_ascending_blocks_that_exist(kept: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="ascending block numbers below 4"):
        _plan(kept, 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stacks": [], "criterium": "even"}, "did you mean 'criterion'"),
        ({"criterion": "even"}, "KeyError"),
        ({"stacks": [{"name": "blocks", "depth_key": "n", "depth": 4, "keep": [0]}]}, "unknown key 'keep'"),
        ({"stacks": [{"name": "blocks", "depth_key": "n", "depth": 4, "kept": 3}]}, "TypeError"),
        ({"stacks": ["blocks"]}, "expected an object"),
        ([], "expected an object"),
    ],
)
def test_other_json_is_refused(data: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        PrunePlan.from_dict(data, "plan.json")


@pytest.mark.parametrize(
    ("kept", "depth", "answers"),
    [
        (tuple(range(0, 28, 2)), 28, tuple(range(1, 28, 2))),  # TinyFusion's map for every other block
        ((0, 1, 2, 3), 4, (0, 1, 2, 3)),
        ((2, 3), 6, (2, 5)),
        ((0,), 6, (5,)),
    ],
)
def test_a_kept_block_answers_for_those_removed_behind_it(
    kept: tuple[int, ...], depth: int, answers: tuple[int, ...]
) -> None:
    plan = _plan(kept, depth)
    assert plan.stacks[0].layer_map() == answers
    assert plan.feature_pairs() == {f"blocks.{new}": f"blocks.{old}" for new, old in enumerate(answers)}
    assert sorted((*plan.stacks[0].kept, *plan.stacks[0].removed)) == list(range(depth))


@pytest.mark.parametrize(
    ("text", "stacks", "keep"),
    [
        ("6", ONE, (6,)),
        ("10,20", TWO, (10, 20)),
        ("single_transformer_blocks=19", TWO, (19, 19)),
        ("transformer_blocks=3, single_transformer_blocks=4", TWO, (3, 4)),
    ],
)
def test_keep_is_a_number_for_each_stack(text: str, stacks: tuple[Stack, ...], keep: tuple[int, ...]) -> None:
    assert parse_keep(text, stacks) == keep


@pytest.mark.parametrize(
    ("text", "stacks", "words"),
    [
        ("0", ONE, "expected 1 to 12 blocks"),
        ("13", ONE, "expected 1 to 12 blocks"),
        ("12", ONE, "every block"),
        ("half", ONE, "found 'half'"),
        ("6", TWO, "expected 2 numbers"),
        ("single_blocks=3", TWO, "did you mean 'single_transformer_blocks'"),
    ],
)
def test_other_words_for_keep_are_refused(text: str, stacks: tuple[Stack, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_keep(text, stacks)


@pytest.mark.parametrize(("key", "value"), [("depth", "four"), ("depth", 4.5), ("kept", [0, "two"]), ("kept", [True])])
def test_blocks_of_a_plan_are_whole_numbers(key: str, value: Any) -> None:
    entry = {"name": "blocks", "depth_key": "num_layers", "depth": 4, "kept": [0, 2], key: value}
    with pytest.raises(InputError, match=rf"plan\.json: {key}: expected a whole number, found "):
        PrunePlan.from_dict({"stacks": [entry]}, "plan.json")


def test_a_plan_is_for_one_kind_of_model() -> None:
    plan = PrunePlan((StackPlan("transformer_blocks", "num_layers", 12, (1, 2)),))
    plan.check(ONE)
    with pytest.raises(InputError, match=r"12 transformer_blocks \(num_layers\), this one has 19"):
        plan.check(TWO)
    with pytest.raises(InputError, match=r"12 transformer_blocks \(n_layers\), this one has 12 .* \(num_layers\)"):
        PrunePlan((StackPlan("transformer_blocks", "n_layers", 12, (1, 2)),)).check(ONE)
    with pytest.raises(InputError, match=r"transformer_blocks\.0 cannot be taken out"):
        plan.check((Stack("transformer_blocks", "num_layers", 12, pinned=(0,)),))
