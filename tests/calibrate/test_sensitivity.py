"""Sensitivities: what the replay measures is what the whole model does, and an interrupted run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdit_quant.calibrate.drift import Drift, drift_of
from vdit_quant.calibrate.model_source import ModelSource
from vdit_quant.calibrate.plan import LayerPlan
from vdit_quant.calibrate.probe import Call, Replay, capture, probe_steps
from vdit_quant.calibrate.sensitivity import (
    VIDITQ_GROUPS,
    Scoring,
    measure,
    measure_samples,
    offers,
    relative_error,
    tie_qkv,
)
from vdit_quant.calibrate.workspace import Workspace
from vdit_quant.evaluate.sampling import Workload, make_sampler
from vdit_quant.quantize.allocate import allocate
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.format import Tensors
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.attach import attach, detach, linear_layers
from vdit_quant.runtime.family import Family, block_of, find_family
from vdit_quant.runtime.source import find_source

SPECS = [LayerSpec.parse(name) for name in ("w4g64-a8tok", "w8-a8tok")]


def layer_plans(model: nn.Module, family: Family) -> list[LayerPlan]:
    blocks = family.block_names(model)
    return [
        LayerPlan(name, role, layer.out_features, layer.in_features, block_of(name, blocks), None, "")
        for (name, role), layer in zip(family.linears(model).items(), linear_layers(model).values(), strict=True)
        if role in ("attention", "feed_forward", "modulation")
    ]


def rounding(model: nn.Module) -> Callable[[LayerPlan, LayerSpec], Tensors]:
    weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}
    return lambda layer, spec: spec.weight.resolve().encode(weights[layer.name], spec.weight)


@pytest.fixture(scope="module")
def model(tiny_dit: Callable[..., Any]) -> Any:
    return tiny_dit()


@pytest.fixture(scope="module")
def calls(model: Any, tiny_folder: Path) -> list[Call]:
    sampler = make_sampler(find_source(tiny_folder), torch.float32, "cpu")
    found = capture(
        sampler.denoiser, sampler.family, lambda: sampler.run(Workload(samples=2, steps=6)), probe_steps(6, 3)
    )
    assert len(found) == 1
    return found


def whole_error(model: nn.Module, call: Call, layer: str, spec: LayerSpec, tensors: Tensors) -> float:
    """By two plain runs of the model."""
    with torch.no_grad():
        reference = call.run(model)
        originals = attach(model, {layer: spec}, {layer: tensors})
        output = call.run(model)
        detach(model, originals)
    return relative_error(output, reference)


def test_the_probe_is_one_batch_of_several_timesteps_and_both_branches(calls: list[Call]) -> None:
    call = calls[0]
    assert call.timesteps is not None
    assert len(set(call.timesteps.tolist())) == 3
    assert len(call.timesteps) == len(call.kwargs["class_labels"]) == 3 * 2 * 2
    assert int((call.kwargs["class_labels"] == 1000).sum()) == 6
    assert probe_steps(20, 5) == {2, 6, 10, 14, 18}
    assert probe_steps(2, 5) == {0, 1}


def test_the_replay_measures_exactly_what_the_whole_model_does(model: Any, calls: list[Call], notes: Any) -> None:
    family, compress = find_family(model), rounding(model)
    offered = offers(layer_plans(model, family), SPECS)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    table = measure(model, family, calls, offered, compress, progress=notes)
    assert [row.layer for row in table] == [layer.name for layer, _ in offered]
    assert len(table) == 14
    assert not notes.lines
    for (layer, specs), row in zip(offered, table, strict=True):
        for spec, candidate in zip(specs, row.candidates, strict=True):
            assert candidate.error == whole_error(model, calls[0], layer.name, spec, compress(layer, spec))
            assert 0 < candidate.error < 1
        assert row.candidates[0].error > row.candidates[1].error
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all("forward" not in vars(block) for block in model.transformer_blocks)
    plan = allocate(table, "6bits")
    assert set(plan.layers.values()) == {"w4g64-a8tok", "w8-a8tok"}


def test_the_replay_does_not_run_the_blocks_before_the_changed_one(model: Any, calls: list[Call]) -> None:
    replay, ran = Replay(model, find_family(model), calls), []
    handles = [
        block.attn1.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(model.transformer_blocks)
    ]
    with torch.no_grad():
        replay.seek("transformer_blocks.1")
        ran.clear()
        [(_, output, reference)] = replay.outputs()
    for handle in handles:
        handle.remove()
    assert ran == [1]
    assert torch.equal(output, reference)


class Skipping(nn.Module):
    """Blocks that also read what an earlier one returned, as in a U-Net: no plain chain."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for number, block in enumerate(self.blocks):
            x = x + block(x + outputs[0] if number == 3 else x)
            outputs.append(x)
        return x


class Chain(Skipping):
    """A model of one's own: blocks return a tuple, of which the second part is passed on as well."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ff = nn.Linear(64, 64)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return y + self.ff(x), x

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            x, y = block(x, y)
        return x + y


@pytest.mark.parametrize("kind", [Skipping, Chain])
def test_models_that_are_no_plain_chain_are_measured_all_the_same(kind: type[nn.Module], notes: Any) -> None:
    model = kind()
    source = ModelSource(model, [torch.randn(5, 64), (torch.randn(3, 64),)])
    family = find_family(model)
    calls = capture(model, family, source.run)
    assert len(calls) == 1
    offered, compress = offers(layer_plans(model, family), SPECS), rounding(model)
    offered = offered or offers(
        [LayerPlan(n, "other", 64, 64, block_of(n, family.block_names(model)), None, "") for n in linear_layers(model)],
        SPECS,
    )
    table = measure(model, family, calls, offered, compress, progress=notes)
    assert len(table) == 4
    for (layer, _), row in zip(offered, table, strict=True):
        want = whole_error(model, calls[0], layer.name, SPECS[0], compress(layer, SPECS[0]))
        assert row.candidates[0].error == want
    assert bool(notes.lines) == (kind is Skipping)


def test_an_interrupted_measurement_goes_on_after_its_last_finished_block(
    model: Any, calls: list[Call], tmp_path: Path
) -> None:
    family, compress = find_family(model), rounding(model)
    offered = offers(layer_plans(model, family), SPECS)
    table = measure(model, family, calls, offered, compress)
    workspace, seen = Workspace(tmp_path / "out"), []
    workspace.open({}, resume=False)

    def fails(layer: LayerPlan, spec: LayerSpec) -> Tensors:
        if layer.block == "transformer_blocks.1":
            raise KeyboardInterrupt
        return compress(layer, spec)

    with pytest.raises(KeyboardInterrupt):
        measure(model, family, calls, offered, fails, workspace=workspace)

    def watched(layer: LayerPlan, spec: LayerSpec) -> Tensors:
        seen.append(layer.block)
        return compress(layer, spec)

    assert measure(model, family, calls, offered, watched, workspace=workspace) == table
    assert set(seen) == {"transformer_blocks.1"}
    seen.clear()
    assert measure(model, family, calls, offered, watched, workspace=workspace) == table
    assert not seen


def test_metrics_groups_weights_and_ties_decide_what_an_error_is(model: Any, calls: list[Call]) -> None:
    family, compress = find_family(model), rounding(model)
    offered = offers(layer_plans(model, family)[:5], SPECS[:1])
    scoring = Scoring(
        metrics={"attention": lambda y, r: float((y - r).abs().amax())},
        groups={"attention": ("*.attn1.*",)},
        timestep_weight=lambda t: float(t > 500),
        tie=tie_qkv,
    )
    table = {row.layer.removeprefix("transformer_blocks.0."): row for row in measure(
        model, family, calls, offered, compress, scoring)}  # fmt: skip
    assert {row.group for name, row in table.items() if "attn1" in name} == {"attention"}
    assert table["norm1.linear"].group == "quality"
    assert table["attn1.to_q"].tie == table["attn1.to_v"].tie == "transformer_blocks.0.attn1.qkv"
    assert table["attn1.to_out.0"].tie == ""
    plain = {row.layer: row for row in measure(model, family, calls, offered, compress)}
    for name, row in table.items():
        assert row.candidates[0].error != plain[f"transformer_blocks.0.{name}"].candidates[0].error
    groups = Scoring(groups=VIDITQ_GROUPS)
    assert groups.group_of("transformer_blocks.3.attn2.to_k") == "alignment"
    assert groups.group_of("temporal_transformer_blocks.3.attn1.to_k") == "temporal"
    assert groups.group_of("transformer_blocks.3.ff.net.2") == "quality"


def test_a_metric_that_gives_no_error_is_refused_and_the_model_is_left_as_it_was(model: Any, calls: list[Call]) -> None:
    family = find_family(model)
    offered = offers(layer_plans(model, family)[:1], SPECS[:1])
    with pytest.raises(InputError, match="the metric of group 'quality' gave nan"):
        measure(model, family, calls, offered, rounding(model), Scoring({"quality": lambda *_: float("nan")}))
    assert all(type(layer) is nn.Linear for layer in linear_layers(model).values())


def test_what_cannot_be_measured_is_refused(model: Any) -> None:
    family = find_family(model)
    with pytest.raises(InputError, match="was not called"):
        capture(model, family, lambda: None)
    with pytest.raises(InputError, match=r"none of the candidates fits.*group size 128"):
        offers(layer_plans(model, family)[:1], [LayerSpec.parse("w4g128")])


def test_sampled_sensitivities_are_errors_of_the_samples(tiny_folder: Path) -> None:
    sampler, work = make_sampler(find_source(tiny_folder), torch.float32, "cpu"), Workload(samples=2, steps=3)
    compress = rounding(sampler.denoiser)
    offered = offers(layer_plans(sampler.denoiser, sampler.family)[-2:], SPECS)
    table = measure_samples(sampler, work, offered, compress)
    reference = sampler.run(work).images
    for (layer, specs), row in zip(offered, table, strict=True):
        for spec, candidate in zip(specs, row.candidates, strict=True):
            originals = attach(sampler.denoiser, {layer.name: spec}, {layer.name: compress(layer, spec)})
            assert candidate.error == relative_error(sampler.run(work).images, reference) > 0
            detach(sampler.denoiser, originals)


def test_drift_adds_a_samples_errors_up_over_its_steps_and_lets_opposite_ones_cancel() -> None:
    steps, branches = torch.tensor([9.0, 9.0, 9.0, 9.0, 4.0, 4.0, 4.0, 4.0]), torch.tensor([0, 0, 1, 1] * 2)
    drift = Drift({9.0: 2.0, 4.0: 1.0}, guidance=1.5)
    e = torch.zeros(8, 3)
    e[0] = e[4] = 1.0  # the first sample's conditional branch at both steps
    assert drift.error(e, steps, branches) == pytest.approx((1.5 * 3) ** 2 / 2)
    e[4] = -2.0
    assert drift.error(e, steps, branches) == 0.0
    e[6] = 1.0  # its unconditional branch
    assert drift.error(e, steps, branches) == pytest.approx(0.5**2 / 2)
    assert drift.error(e[::4], steps[::4], branches[::4]) == 0.0


def test_drift_weights_cover_the_whole_path_of_the_scheduler() -> None:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    noise = DDIMScheduler(beta_schedule="linear")
    sigma = ((1 - noise.alphas_cumprod) / noise.alphas_cumprod).sqrt()
    weights = drift_of(noise, [850, 450, 50]).weights
    assert list(weights) == [850.0, 450.0, 50.0]
    assert sum(weights.values()) == pytest.approx(float(torch.asinh(sigma[850])), rel=1e-5)
    flow = drift_of(FlowMatchEulerDiscreteScheduler(), [900.0, 500.0, 100.0]).weights
    assert list(flow.values()) == pytest.approx([0.4, 0.4, 0.1])
    velocity = DPMSolverMultistepScheduler(beta_schedule="linear", prediction_type="v_prediction")
    assert drift_of(velocity, [850]).weights[850.0] < drift_of(noise, [850]).weights[850.0] / 30
    with pytest.raises(InputError, match="no noise schedule"):
        drift_of(object(), [1])


def test_drift_is_what_a_replay_is_scored_by_when_it_is_given(model: Any, calls: list[Call]) -> None:
    family, compress = find_family(model), rounding(model)
    offered = offers(layer_plans(model, family)[-1:], SPECS[:1])
    assert calls[0].timesteps is not None
    drift = Drift(dict.fromkeys(calls[0].timesteps.tolist(), 0.5), 2.0)
    [row] = measure(model, family, calls, offered, compress, Scoring(drift=drift))
    [(layer, [spec])], [call] = offered, calls
    with torch.no_grad():
        reference = call.run(model)
        originals = attach(model, {layer.name: spec}, {layer.name: compress(layer, spec)})
        difference = call.run(model) - reference
        detach(model, originals)
    labels = call.kwargs["class_labels"]
    cond, uncond = (difference[rows].reshape(3, 2, -1).sum(0) for rows in (labels != 1000, labels == 1000))
    total = 0.5 * (2 * cond - uncond)
    assert row.candidates[0].error == pytest.approx(float(total.square().mean()), rel=1e-4)


def test_relative_error_weighs_rows() -> None:
    reference, output = torch.ones(2, 4), torch.ones(2, 4)
    output[0] += 0.5
    assert relative_error(output, reference) == pytest.approx(0.125)
    assert relative_error(output, reference, torch.tensor([3.0, 1.0])) == pytest.approx(0.1875)
