"""The decisions that act at run time: the step schedule and the bit plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vdit_quant
from vdit_quant.quantize.bit_plan import BitPlan
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.describe import describe_artifact
from vdit_quant.runtime.linear import CompressedLinear
from vdit_quant.runtime.schedule import StepPlan, plan_steps

FAST = {"samples": 2, "steps": 4, "guidance": 1.5, "device": "cpu"}


def _forward(model: torch.nn.Module, timestep: int) -> torch.Tensor:
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, timestep=torch.full((2,), timestep), class_labels=torch.tensor([1, 7]), return_dict=False)[0]


def test_the_schedule_spares_the_steps_it_names() -> None:
    plan = plan_steps([900, 700, 500, 300, 100], first=1, last=2)
    assert [plan.is_full(t) for t in (999, 900, 801, 799, 500, 401, 399, 300, 0)] == [
        True, True, True, False, False, False, True, True, True,
    ]  # fmt: skip
    assert StepPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_schedule_speaks_the_denoisers_timesteps() -> None:
    plan = plan_steps([1000, 750, 500, 250], first=1, last=1, scale=0.001)
    assert [plan.is_full(t) for t in (1.0, 0.75, 0.5, 0.25)] == [True, False, False, True]


@pytest.mark.parametrize(("first", "last"), [(-1, 0), (3, 3)])
def test_more_steps_than_there_are_is_refused(first: int, last: int) -> None:
    with pytest.raises(InputError, match="full-steps"):
        plan_steps([900, 700, 500, 300], first, last)


def test_the_same_weights_run_with_full_activations_where_the_plan_says(tmp_path: Path) -> None:
    common = {"method": "rtn", **FAST}
    scheduled = vdit_quant.load(vdit_quant.compress(None, tmp_path / "s", bits="w4a8", full_steps=(1, 0), **common))
    always = vdit_quant.load(vdit_quant.compress(None, tmp_path / "a", bits="w4a8", **common))
    weight_only = vdit_quant.load(vdit_quant.compress(None, tmp_path / "w", bits="w4a16", **common))
    assert torch.equal(_forward(scheduled.transformer, 900), _forward(weight_only.transformer, 900))
    assert torch.equal(_forward(scheduled.transformer, 100), _forward(always.transformer, 100))
    assert not torch.equal(_forward(always.transformer, 900), _forward(weight_only.transformer, 900))


def test_a_budget_is_met_stored_and_loaded(tmp_path: Path) -> None:
    path = vdit_quant.compress(None, tmp_path / "mixed", budget="4.5bits", method="rtn", **FAST)
    found = describe_artifact(path, "cpu")
    plan = BitPlan.from_dict(found["plans"]["bits"])
    assert plan.bits <= 4.5
    assert plan.bytes == found["compressed_bytes"]
    assert len({spec.split("-")[0] for spec in plan.layers.values()}) > 1
    layers = dict(vdit_quant.load(path).transformer.named_modules())
    for name, spec in plan.layers.items():
        layer = layers[name]
        assert isinstance(layer, CompressedLinear)
        assert layer.spec.name == spec


def test_a_budget_below_every_candidate_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bits"):
        vdit_quant.compress(None, tmp_path / "x", budget="1bits", method="rtn", **FAST)
    assert not list(tmp_path.iterdir())


def test_a_budget_that_cannot_be_read_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2\.5x"):
        vdit_quant.compress(None, tmp_path / "x", budget="small", **FAST)
    assert not list(tmp_path.iterdir())
