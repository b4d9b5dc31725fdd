"""Objectives against the schedulers they are taken from, patterns, and budgets."""

from typing import Any

import diffusers
import pytest
import torch

from vdit_quant.prune.budget import Duration
from vdit_quant.prune.objective import objective_of
from vdit_quant.prune.patterns import cut
from vdit_quant.prune.plan import Stack
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.families.dit import FAMILY as DIT
from vdit_quant.runtime.families.flux import FAMILY as FLUX

CLEAN, NOISE = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
U = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.999])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noising_is_the_schedulers(kind: str) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=kind, beta_schedule="linear")
    noised, timestep, target = objective_of(scheduler, DIT).noise(CLEAN, NOISE, U)
    assert timestep.tolist() == [0, 200, 500, 800, 999]
    torch.testing.assert_close(noised, scheduler.add_noise(CLEAN, NOISE, timestep))
    wants = {"epsilon": NOISE, "sample": CLEAN, "v_prediction": scheduler.get_velocity(CLEAN, NOISE, timestep)}
    torch.testing.assert_close(target, wants[kind])


def test_flow_noising_is_the_schedulers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = objective_of(scheduler, FLUX)
    steps = torch.tensor([0, 300, 700, 998])
    # the scheduler's own timesteps are 1000 sigma of an even grid, shifted
    even = torch.linspace(1, 1 / 1000, 1000)[steps]
    noised, timestep, target = objective.noise(CLEAN[:4], NOISE[:4], even)
    torch.testing.assert_close(timestep, scheduler.timesteps[steps] / 1000)
    torch.testing.assert_close(noised, scheduler.scale_noise(CLEAN[:4], scheduler.timesteps[steps], NOISE[:4]))
    # one step back along a perfect answer ends at the clean latents
    torch.testing.assert_close(noised - timestep.view(-1, 1, 1, 1) * target, CLEAN[:4], atol=1e-5, rtol=1e-4)


def test_a_scheduler_without_a_known_loss_is_refused() -> None:
    scheduler: Any = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    assert objective_of(scheduler, DIT).kind == "v_prediction"
    scheduler.register_to_config(prediction_type="thrice")
    with pytest.raises(InputError, match="prediction_type 'thrice'"):
        objective_of(scheduler, DIT)


@pytest.mark.parametrize(
    ("depth", "keep", "names"),
    [
        (12, 6, ["1:2"] * 6),
        (12, 9, ["3:4"] * 3),
        (28, 14, ["1:2"] * 14),
        (28, 7, ["1:4"] * 7),
        (28, 19, ["2:4", "3:4", "3:4", "2:4", "3:4", "3:4", "3:4"]),
        (7, 3, ["1:3", "2:4"]),
    ],
)
def test_groups_are_small_and_add_up(depth: int, keep: int, names: list[str]) -> None:
    groups = cut(Stack("blocks", "n", depth), keep)
    assert [group.name for group in groups] == names
    assert [i for group in groups for i in group.blocks] == list(range(depth))
    assert sum(group.keep for group in groups) == keep
    for group in groups:
        options = group.options()
        assert (options.sum(1) == group.keep).all()
        assert len({tuple(row) for row in options.tolist()}) == len(options)


@pytest.mark.parametrize("pinned", [(), (0,), (0, 1, 2), (5, 6, 7)])
def test_every_number_of_blocks_can_be_kept(pinned: tuple[int, ...]) -> None:
    for depth in range(2, 64):
        stack = Stack("blocks", "n", depth, tuple(i for i in pinned if i < depth))
        for keep in range(max(1, len(stack.pinned)), depth):
            groups = cut(stack, keep)
            assert sum(group.keep for group in groups) == keep, (depth, keep)
            assert [i for group in groups for i in group.blocks] == list(range(depth))
            assert all(group.keep <= group.size <= 4 for group in groups)


def test_a_group_keeps_its_pinned_blocks() -> None:
    groups = cut(Stack("blocks", "n", 8, (0, 1)), 4)
    assert [group.name for group in groups] == ["2:2", "0:2", "1:2", "1:2"]
    with pytest.raises(InputError, match=r"blocks: 2 of its 8 blocks are pinned, and 1 are kept"):
        cut(Stack("blocks", "n", 8, (0, 1)), 1)
    with pytest.raises(InputError, match=r"group 1:2 at blocks\.0: more blocks are pinned than it keeps"):
        cut(Stack("blocks", "n", 8, (0, 1)), 4, ["1:2"])


def test_groups_can_be_given() -> None:
    stack = Stack("blocks", "n", 8)
    assert [g.name for g in cut(stack, 4, ["2:4"])] == ["2:4", "2:4"]
    assert [g.name for g in cut(stack, 4, ["1:4", "3:4"])] == ["1:4", "3:4"]
    for given, words in ((["1:2", "1:3"], "keep 2 of 5"), (["half"], "expected N:M"), (["3:2"], "expected N:M")):
        with pytest.raises(InputError, match=words):
            cut(stack, 4, given)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("300", (300, None)),
        ("300 steps", (300, None)),
        ("90s", (None, 90)),
        ("1.5min", (None, 90)),
        ("2h", (None, 7200)),
    ],
)
def test_budgets_are_steps_or_time(text: str, want: tuple[int | None, float | None]) -> None:
    found = Duration.parse(text)
    assert (found.steps, found.seconds) == want


@pytest.mark.parametrize("text", ["", "soon", "-3", "1.5", "3 days", "1e3"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a"):
        Duration.parse(text)
