"""The probe of a denoiser that is called once a guidance branch, one sample at a time, or for a part of the path."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from vdit_quant.calibrate import mixed
from vdit_quant.calibrate.drift import Drift, drift_of, end_of
from vdit_quant.calibrate.probe import capture, probe_steps
from vdit_quant.calibrate.sensitivity import Scoring
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.family import find_family


class Denoiser(nn.Module):
    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return hidden_states * encoder_hidden_states.mean()


def _sample(model: nn.Module, samples: int, steps: int, branches: int = 2, batch: int = 1) -> None:
    """As a Wan pipeline does: at every step one call a branch, of the same latents."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(samples // batch):
        for t in torch.linspace(1000, 50, steps):
            x = torch.randn(batch, 4, 2, 2, generator=draw)
            for branch in range(branches):
                model(x, timestep=t.expand(batch), encoder_hidden_states=torch.full((batch, 3), 1.0 + branch))


def test_the_probe_has_every_sample_whole_where_each_branch_is_a_call_of_its_own() -> None:
    model = Denoiser()
    [call] = capture(model, find_family(model), lambda: _sample(model, 8, 20), probe_steps(20))
    assert len(call.branches) == 5 * 2 * 8
    assert call.timesteps is not None
    drift = Drift(dict.fromkeys(call.timesteps.tolist(), 0.5), guidance=5.0)
    reference = call.run(model)
    error, _ = Scoring(drift=drift).score("quality", [(call, reference + 1.0, reference)])
    assert error == pytest.approx((5 * 0.5 * (5.0 - 4.0)) ** 2)


def test_arguments_that_hold_several_tensors_are_those_of_every_call() -> None:
    """Positions of CogVideoX are cosines and sines, the same objects for one call and equal ones for the next."""

    class Rotated(Denoiser):
        def forward(self, hidden_states: Tensor, timestep: Tensor, image_rotary_emb: Any) -> Tensor:  # type: ignore[override]
            cosines, sines = image_rotary_emb
            return hidden_states * cosines.mean() + sines.mean()

    model = Rotated()

    def sample() -> None:
        for start in (1.0, 2.0):
            for t in torch.linspace(1000, 50, 20):
                x = torch.full((1, 4, 2, 2), start)
                model(x, timestep=t.expand(1), image_rotary_emb=(torch.full((6, 3), 0.5), torch.ones(6, 3)))

    [call] = capture(model, find_family(model), sample, probe_steps(20))
    assert len(call.branches) == 5 * 2
    assert torch.equal(call.run(model).flatten(1).unique(), torch.tensor([1.5, 2.0]))


def test_drift_names_the_step_at_which_samples_are_missing() -> None:
    steps, branches = torch.tensor([9.0, 9.0, 4.0]), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"2 samples at timestep 9 .*1 elsewhere"):
        Drift({9.0: 1.0, 4.0: 1.0}).effect(torch.ones(3, 2), steps, branches)


def test_drift_takes_a_step_without_guidance_as_it_is() -> None:
    steps, branches = torch.tensor([9.0, 9.0, 4.0]), torch.tensor([0, 1, 0])
    effect = Drift({9.0: 1.0, 4.0: 1.0}, guidance=3.0).effect(torch.tensor([[1.0], [0.5], [0.25]]), steps, branches)
    assert effect.tolist() == [pytest.approx(3 * 1.0 - 2 * 0.5 + 0.25)]


@pytest.mark.parametrize(("branches", "want"), [(1, [0] * 6), (2, [0, 0, 1, 1] * 3)])
def test_the_next_batch_of_a_run_of_one_step_is_no_second_branch(branches: int, want: list[int]) -> None:
    model = Denoiser()
    [call] = capture(model, find_family(model), lambda: _sample(model, 6, 1, branches, batch=2))
    assert call.branches.tolist() == want


class Scheduler:
    """Flow matching, of 5 steps."""

    sigmas = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    timesteps = torch.tensor([1000.0, 800.0, 600.0, 400.0, 200.0])
    config: ClassVar[dict[str, Any]] = {"prediction_type": "flow_prediction", "num_train_timesteps": 1000}


@pytest.mark.parametrize(("scale", "called", "end"), [(1.0, 2, 0.6), (1.0, 5, 0.0), (0.001, 2, 0.6), (0.001, 5, 0.0)])
def test_a_denoiser_of_a_part_of_the_path_is_charged_with_that_part(scale: float, called: int, end: float) -> None:
    steps = (Scheduler.timesteps[:called] * scale).tolist()
    sampler: Any = SimpleNamespace(scheduler=Scheduler(), family=SimpleNamespace(timestep_scale=scale))
    probed: Any = [SimpleNamespace(timesteps=torch.tensor(steps[:2]))]
    weights = mixed._drift(sampler, probed, steps[-1], 1.0).weights
    assert sum(weights.values()) == pytest.approx((1.0 - end) * scale)
    assert all(weight > 0 for weight in weights.values())


def test_the_path_goes_on_at_the_next_timestep_of_the_schedule() -> None:
    assert end_of(Scheduler.timesteps, 800) == 600
    assert end_of(Scheduler.timesteps, 200) is None
    assert end_of([0.8, 0.2], 0.2 + 1e-7) is None, "a float32 on its way to the model is not another step"
    assert drift_of(Scheduler(), [960.0, 900.0], end=875.0).weights[900.0] == pytest.approx(0.025)
