"""The contract of every criterion, and what sets each apart."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vdit_quant.prune import criteria
from vdit_quant.prune.criterion import criterion_names, find_criterion
from vdit_quant.prune.plan import Stack
from vdit_quant.quantize import registry
from vdit_quant.quantize.errors import InputError


@pytest.mark.parametrize("keep", [1, 3, 4, 5])
@pytest.mark.parametrize("name", criterion_names())
def test_a_criterion_keeps_what_was_asked_for(name: str, keep: int, study: Callable[..., Any]) -> None:
    plan = find_criterion(name).choose(study(), (keep,))
    (stack,) = plan.stacks
    assert (stack.name, stack.depth_key, stack.depth) == ("transformer_blocks", "num_layers", 6)
    assert len(stack.kept) == keep
    assert plan == find_criterion(name).choose(study(), (keep,)), "not the same twice"


@pytest.mark.parametrize("name", criterion_names())
def test_a_criterion_leaves_the_model_as_it_was(name: str, study: Callable[..., Any]) -> None:
    given = study()
    before = copy.deepcopy(given.model)
    find_criterion(name).choose(given, (3,))
    for (key, got), want in zip(given.model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(got, want), key
    for (key, module), plain in zip(given.model.named_modules(), before.modules(), strict=True):
        assert not module._forward_hooks, key
        assert not module._forward_pre_hooks, key
        assert vars(module).keys() == vars(plain).keys(), key
    assert not any(p.requires_grad for p in given.model.parameters())


@pytest.mark.parametrize("name", criterion_names())
def test_a_pinned_block_stays(name: str, study: Callable[..., Any]) -> None:
    for pinned in (0, 3):
        given = study(stacks=(Stack("transformer_blocks", "num_layers", 6, (pinned,)),))
        assert pinned in find_criterion(name).choose(given, (2,)).stacks[0].kept


def _silence(block: Any) -> None:
    """Gates at zero: x + 0 * attention + 0 * feed-forward."""
    with torch.no_grad():
        block.norm1.linear.weight.zero_()
        block.norm1.linear.bias.zero_()


@pytest.mark.parametrize("name", ["block_influence", "relative_error", "sensitivity"])
def test_a_block_that_does_nothing_scores_nothing(name: str, study: Callable[..., Any]) -> None:
    given = study()
    _silence(given.model.transformer_blocks[4])
    plan = find_criterion(name).choose(given, (5,))
    others = [abs(score) for i, score in enumerate(plan.stacks[0].scores) if i != 4]
    assert plan.stacks[0].scores[4] == pytest.approx(0, abs=1e-6)
    assert min(others) > 1e-5
    if name != "sensitivity":  # to leave a block out of a random model may as well lower the loss
        assert plan.stacks[0].removed == (4,)


def test_sensitivity_is_the_rise_of_the_loss(study: Callable[..., Any]) -> None:
    given = study()
    scores = find_criterion("sensitivity").choose(given, (5,)).stacks[0].scores
    block, batches = given.model.transformer_blocks[2], list(given.batches())
    whole = sum(share * float(batch.error(batch.predict(given.model))) for batch, share in batches)
    block.forward = lambda hidden_states, *_, **__: hidden_states
    without = sum(share * float(batch.error(batch.predict(given.model))) for batch, share in batches)
    assert scores[2] == pytest.approx(without - whole, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["block_influence", "relative_error", "sensitivity"])
def test_few_samples_at_a_time_give_the_same_scores(name: str, study: Callable[..., Any]) -> None:
    given, sizes = study(), []
    given.model.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    whole = find_criterion(name).choose(given, (5,)).stacks[0].scores
    assert set(sizes) == {8}
    sizes.clear()
    parts = find_criterion(name).choose(study(micro=3), (5,)).stacks[0].scores
    assert set(sizes) == {3, 2}
    assert parts == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_magnitude_takes_the_smallest_weights_out(study: Callable[..., Any]) -> None:
    given = study()
    with torch.no_grad():
        for parameter in given.model.transformer_blocks[2].parameters():
            parameter.mul_(0.5)
    assert find_criterion("magnitude").choose(given, (5,)).stacks[0].removed == (2,)


@pytest.mark.parametrize(
    ("depth", "keep", "kept"),
    [(12, 6, (0, 2, 4, 7, 9, 11)), (28, 14, (0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27)), (6, 2, (0, 5))],
)
def test_even_spreads_what_stays(depth: int, keep: int, kept: tuple[int, ...], study: Callable[..., Any]) -> None:
    given = study(stacks=(Stack("transformer_blocks", "num_layers", depth),))
    assert find_criterion("even").choose(given, (keep,)).stacks[0].kept == kept


def test_learned_finds_the_blocks_that_matter(study: Callable[..., Any]) -> None:
    """Of each pair one block does nothing: a short search must keep the others."""
    given = study(steps=60)
    idle = (1, 2, 5)
    for index in idle:
        _silence(given.model.transformer_blocks[index])
    plan = find_criterion("learned").choose(given, (3,))
    assert plan.stacks[0].removed == idle
    assert plan.notes["groups"] == ["1:2"] * 3
    assert all(0 <= score <= 1 for score in plan.stacks[0].scores)
    assert sum(plan.stacks[0].scores) == pytest.approx(3, abs=1e-3)


def test_an_unknown_criterion_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="did you mean 'learned'"):
        find_criterion("learnt")
    assert registry.names(criteria) == criterion_names()
