"""Rotations that calibration may leave out: the better way is taken, and every part of an artifact knows which."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vdit_quant
from vdit_quant.calibrate.pipeline import compress, open_source, plan_source
from vdit_quant.quantize.compose import recorded_error
from vdit_quant.quantize.format import Tensors
from vdit_quant.quantize.layer import dense_weight, layer_layout, run_layer, settled_spec
from vdit_quant.quantize.method import FloatLayer, resolve_method
from vdit_quant.quantize.recipe import Recipe
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.quantize.stats import LayerStats
from vdit_quant.runtime.artifact import read_config

N, K = 64, 256


def _recipe(rotate: str) -> Recipe:
    core = {"method": "viditq", "spec": "w4g64-a8tok", "roles": ["attention", "feed_forward"]}
    step = {**core, "params": {"rotate": rotate, "hadamard": 16}}
    return Recipe.from_dict({"name": "searched", "step": [step]}, "searched")


def _even_but_for_spikes() -> Tensor:
    """Channels as they should be, but for one that is huge: codes of int8 have little left for the others."""
    x = torch.randn(512, K, generator=torch.Generator().manual_seed(0))
    x[:, 17] *= 200
    return x


def _even() -> Tensor:
    """Nothing for a rotation to even out. It would only turn weights that are spread evenly, which fit a grid of
    integers best, into a bell with tails."""
    return torch.randn(512, K, generator=torch.Generator().manual_seed(1))


def _compress(x: Tensor, rotate: str, hadamard: int = 64) -> tuple[Tensor, LayerStats, Tensors, LayerSpec]:
    weight = torch.rand(N, K, generator=torch.Generator().manual_seed(2)) - 0.5
    method, params = resolve_method("viditq", {"rotate": rotate, "hadamard": hadamard})
    spec = method.complete(LayerSpec.parse("w4g64-a8tok"), N, K, params)
    stats = LayerStats.empty(K, frozenset({"gram", "rows"}))
    stats.update(x, 0, 0, keep=256)
    tensors = method.compress(FloatLayer("x", weight), stats.finish(), spec, **params)
    return weight, stats, tensors, settled_spec(spec, tensors)


@pytest.mark.parametrize(("inputs", "rotated"), [(_even_but_for_spikes, True), (_even, False)])
def test_the_way_that_errs_less_is_taken(inputs, rotated: bool) -> None:
    x = inputs()
    weight, stats, tensors, spec = _compress(x, "search")
    assert (spec.hadamard is not None) == rotated
    assert {name: t.shape for name, t in tensors.items()} == {
        name: layout.shape for name, layout in layer_layout(N, K, spec).items()
    }
    ways = [_compress(x, "always"), _compress(x, "always", hadamard=0)]
    errors = [recorded_error(weight, stats, way[2], way[3]) for way in ways]
    assert recorded_error(weight, stats, tensors, spec) == min(errors)
    assert errors[0] != errors[1]


@pytest.mark.parametrize("hadamard", [0, 64])
def test_the_error_it_goes_by_is_that_of_the_layers_output(hadamard: int) -> None:
    x = _even()
    weight, stats, tensors, spec = _compress(x, "always", hadamard)
    assert stats.rows is not None
    assert len(stats.rows) == 256
    got = (run_layer(x, tensors, spec, None) - x @ weight.T).square().sum(1).mean()
    assert recorded_error(weight, stats, tensors, spec) == pytest.approx(float(got), rel=0.25)
    exact = dataclasses.replace(spec, activation=None)
    change = dense_weight(tensors, K, spec) - weight
    expected = float((x @ change.T).square().sum(1).mean())
    assert recorded_error(weight, stats, tensors, exact) == pytest.approx(expected, rel=1e-3)


def test_an_artifact_says_which_layers_are_rotated_and_runs(tiny_folder: Path, tmp_path: Path, notes: Any) -> None:
    options = {"recipe": _recipe("search"), "steps": 4, "samples": 4, "device": "cpu"}
    folder = compress(tiny_folder, tmp_path / "out", progress=notes, **options)
    layers = [layer.name for layer in plan_source(open_source(tiny_folder), _recipe("search")).compressed]
    specs, stored = read_config(folder).resolve(layers), _names(folder)
    assert specs.keys() == set(layers)
    for name, spec in specs.items():
        assert (f"{name}.hadamard_signs" in stored) == (spec.hadamard is not None)
    assert len({specs[f"transformer_blocks.0.attn1.to_{x}"] for x in "qkv"}) == 1, "one input, one rotation"
    plain = sum(spec.hadamard is None for spec in specs.values())
    assert f"rotation left out of {plain} of {len(specs)} layers, which err less without it" in notes.lines
    assert vdit_quant.load(folder, device="cpu") is not None


def test_under_a_budget_too_rotations_are_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    options = {"recipe": _recipe("search"), "steps": 4, "samples": 4, "device": "cpu", "budget": "5bits"}
    folder = compress(tiny_folder, tmp_path / "out", **options)
    config = read_config(folder)
    layers, stored = config.plans["bits"]["layers"], _names(folder)
    for name, spec in config.resolve(layers).items():
        assert layers[name] == spec.name
        assert (f"{name}.hadamard_signs" in stored) == (spec.hadamard is not None)
    assert any(spec.hadamard is None for spec in config.resolve(layers).values())


def _names(folder: Path) -> set[str]:
    from safetensors import safe_open

    found: set[str] = set()
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    return found
