"""Where a sampling run is, read off the model's own calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vdit_quant.runtime.family import find_family
from vdit_quant.runtime.step import StepTracker, bind_call, signature_of, timestep_of


@torch.no_grad()
def test_steps_follow_the_timestep_and_start_again(
    tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any]
) -> None:
    model = tiny_dit()
    inputs = dit_inputs(model, batch=4)
    seen = []
    with StepTracker(model, find_family(model)) as tracker:
        for t in (900, 900, 500, 100, 900, 500):
            model(**{**inputs, "timestep": torch.full((4,), t)})
            seen.append((tracker.index, tracker.repeat, tracker.timestep))
        assert torch.equal(tracker.latents, inputs["hidden_states"])
        assert tracker.branches.tolist() == [0, 0, 1, 1]
    assert [index for index, _, _ in seen] == [0, 0, 1, 2, 0, 1]
    assert [repeat for _, repeat, _ in seen] == [0, 1, 0, 0, 0, 0]
    assert seen[3][2] == 100
    model(**{**inputs, "timestep": torch.full((4,), 50)})
    assert tracker.timestep == 500, "it still listens after its block ended"


class Rising(nn.Module):
    """Told how far it has come, and given its samples one by one, as Z-Image is."""

    def forward(self, x: list[torch.Tensor], t: torch.Tensor) -> list[torch.Tensor]:
        return x


def test_timesteps_may_rise_and_samples_be_a_list() -> None:
    model, seen = Rising(), []
    with StepTracker(model, find_family(model)) as tracker:
        for t in (0.0, 0.25, 0.5, 0.75, 0.0, 0.0, 0.25, 0.5):
            model([torch.full((3,), 1.0), torch.full((3,), 2.0)], torch.full((2,), t))
            seen.append(tracker.index)
        assert torch.equal(tracker.latents, torch.tensor([[1.0] * 3, [2.0] * 3]))
        assert tracker.branches.tolist() == [0, 0]
        tracker.reset()
        for t in (0.0, 0.25, 0.5):
            model([torch.ones(3), torch.ones(3)], torch.full((2,), t))
            seen.append(tracker.index)
        model([torch.ones(3), torch.ones(4)], torch.zeros(2))  # samples of other sizes are no one tensor
    # which way they go is known from the third step on
    assert seen == [0, 0, 2, 3, 0, 0, 1, 2, 0, 1, 2]


@torch.no_grad()
def test_positional_arguments_are_understood(tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any]) -> None:
    model = tiny_dit()
    inputs = dit_inputs(model, batch=2)
    with StepTracker(model, find_family(model)) as tracker:
        model(inputs["hidden_states"], inputs["timestep"], inputs["class_labels"])
        assert (tracker.index, tracker.timestep) == (0, 500)
        assert tracker.branches.tolist() == [0, 1]


def test_tokens_of_a_given_image_are_at_0_and_the_step_is_that_of_the_others() -> None:
    model, seen = Rising(), []
    given = torch.tensor([0.0, 0.0, 1.0, 1.0])  # the first frame's tokens
    with StepTracker(model, find_family(model)) as tracker:
        for t in (900.0, 500.0, 100.0):
            timestep = (t * given).expand(2, -1)
            model([torch.ones(3), torch.ones(3)], timestep)
            seen.append((tracker.index, tracker.timestep))
            assert timestep_of(model, (), {"t": timestep}) == t
    assert seen == [(0, 900), (1, 500), (2, 100)]


class OnInstance(nn.Module):
    """Its forward is not its class's."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda hidden_states, timestep: hidden_states


@pytest.mark.parametrize("make", [lambda m: torch.compile(m, backend="eager"), lambda _: OnInstance()])
def test_a_forward_that_the_class_does_not_say_is_understood(
    make: Callable[[Any], Any], tiny_dit: Callable[..., Any]
) -> None:
    named = bind_call(signature_of(make(tiny_dit())), (torch.zeros(1),), {"timestep": 7})
    assert named["timestep"] == 7
    assert torch.equal(named["hidden_states"], torch.zeros(1))
