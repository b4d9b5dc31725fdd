"""The decisions that act at run time: the step schedule and the bit plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vdit_quant
from vdit_quant.calibrate import statistics
from vdit_quant.calibrate.mixed import CANDIDATES, allocate_bits, candidates, prepare
from vdit_quant.calibrate.options import Options
from vdit_quant.calibrate.pipeline import open_source, plan_source
from vdit_quant.calibrate.plan import LayerPlan, Plan
from vdit_quant.calibrate.progress import Progress
from vdit_quant.calibrate.timing import MODULATION_ROWS, ROWS
from vdit_quant.calibrate.workspace import Workspace
from vdit_quant.evaluate.sampling import Workload
from vdit_quant.quantize.bit_plan import BitPlan
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.spec import LayerSpec
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
    def loaded(name: str, bits: str, **more: Any) -> torch.nn.Module:
        path = vdit_quant.compress(None, tmp_path / name, bits=bits, method="rtn", **FAST, **more)
        return vdit_quant.load(path, device="cpu").transformer

    scheduled = loaded("s", "w4a8", full_steps=(1, 0))
    always, weight_only = loaded("a", "w4a8"), loaded("w", "w4a16")
    assert torch.equal(_forward(scheduled, 900), _forward(weight_only, 900))
    assert torch.equal(_forward(scheduled, 100), _forward(always, 100))
    assert not torch.equal(_forward(always, 900), _forward(weight_only, 900))


def test_a_budget_is_met_stored_and_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    path = vdit_quant.compress(tiny_folder, tmp_path / "mixed", budget="4.5bits", bits="w4a8", **FAST)
    found = describe_artifact(path, "cpu")
    plan = BitPlan.from_dict(found["plans"]["bits"])
    assert plan.bits <= 4.5
    assert plan.bytes == found["compressed_bytes"]
    assert len({spec.split("-")[0] for spec in plan.layers.values()}) > 1
    layers = dict(vdit_quant.load(path).named_modules())
    for name, spec in plan.layers.items():
        layer = layers[name]
        assert isinstance(layer, CompressedLinear)
        assert layer.spec.name == spec


@pytest.mark.parametrize(("method", "rotated"), [("gptq", {True, False}), ("rtn", {False})])
def test_modulation_layers_may_be_rotated_where_that_can_help(method: str, rotated: set[bool]) -> None:
    layer = LayerPlan("norm1.linear", "modulation", 768, 128, None, LayerSpec.parse("w8"), "", method)
    offered = candidates(layer)
    for name in CANDIDATES:
        assert {spec.hadamard is not None for spec in offered if spec.name.split("-")[0] == name} == rotated
    core = dataclasses.replace(layer, name="to_q", role="attention", spec=LayerSpec.parse("w4g64-a8tok"))
    assert len(candidates(core)) == len(CANDIDATES)


def test_a_budget_that_cannot_be_read_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2\.5x"):
        vdit_quant.compress(None, tmp_path / "x", budget="small", **FAST)
    assert not list(tmp_path.iterdir())


def test_a_time_budget_needs_a_gpu_and_says_so_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3\.2ms.*measured on a GPU.*cpu.*--device.*4\.5bits"):
        vdit_quant.compress(None, tmp_path / "x", budget="3.2ms", method="rtn", **FAST)
    assert not list(tmp_path.iterdir())


def _clock(rows: int, n: int, k: int, spec: LayerSpec) -> float:
    """A machine on which 4 bits are fast, all others slow, and a modulation layer takes next to no time."""
    return n * k * (1e-9 if rows == MODULATION_ROWS else 4e-6 if spec.weight.format == "int4" else 8e-6)


def _plan_of(folder: Path) -> tuple[Any, Plan]:
    source = open_source(folder)
    recipe = Options(bits="w4a8", method="rtn", budget="1ms").resolve_recipe()
    return source, plan_source(source, recipe)


def test_a_time_budget_bounds_the_sum_of_measured_times_and_times_each_shape_once(
    tiny_folder: Path, tmp_path: Path
) -> None:
    source, plan = _plan_of(tiny_folder)
    asked: list[tuple[int, int, int, str]] = []

    def timer(rows: int, n: int, k: int, spec: LayerSpec) -> float:
        asked.append((rows, n, k, spec.name))
        return _clock(rows, n, k, spec)

    fastest = sum(_clock(_rows(p), p.n, p.k, LayerSpec.parse("w4g64")) for p in plan.compressed)
    budget = f"{1.5 * fastest:.6f}ms"
    sizing = prepare(plan, budget, "drift", torch.device("cpu"), timer=timer)
    assert len(asked) == len(set(asked))
    workspace = Workspace(tmp_path / "out")
    workspace.open({}, resume=False)
    work = Workload(samples=2, steps=4, guidance_scale=1.5)
    _, bits = allocate_bits(source, plan, sizing, work, workspace, Progress(), torch.device("cpu"))
    spent = sum(_clock(_rows(p), p.n, p.k, bits.spec_of(p.name)) for p in plan.compressed)
    assert bits.ms == pytest.approx(spent)
    assert fastest < spent <= 1.5 * fastest
    formats = {bits.spec_of(p.name).weight.format for p in plan.compressed if p.role != "modulation"}
    assert "int4" in formats
    assert not formats & {"int2", "int3"}, "what is slower than 4 bits and coarser is never chosen"


def test_a_time_below_every_candidate_names_the_smallest(tiny_folder: Path) -> None:
    _, plan = _plan_of(tiny_folder)
    with pytest.raises(InputError, match=r"cannot be met.*come to [\d.]+ms"):
        prepare(plan, "0.0001ms", "drift", torch.device("cpu"), timer=_clock)


def _rows(layer: LayerPlan) -> int:
    return MODULATION_ROWS if layer.role == "modulation" else ROWS


@pytest.mark.parametrize("budget", ["1bits", "1000x"])
def test_a_budget_that_cannot_be_met_is_refused_before_the_model_runs(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "gather", lambda *a, **k: pytest.fail("the model was run"))
    with pytest.raises(InputError, match=r"cannot be met.* come to 2\.\d+bits|cannot be met.* come to [\d.]+x"):
        vdit_quant.compress(None, tmp_path / "x", budget=budget, bits="w4a8", **FAST)
    assert not list(tmp_path.iterdir())


def test_a_budget_gives_the_same_plan_with_one_block_on_the_device(tiny_folder: Path, tmp_path: Path) -> None:
    common = {"budget": "4bits", "bits": "w4a8", **FAST}
    plans = [
        describe_artifact(vdit_quant.compress(tiny_folder, tmp_path / str(off), offload=off, **common), "cpu")["plans"]
        for off in (False, True)
    ]
    assert plans[0] == plans[1]
