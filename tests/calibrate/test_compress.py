"""Layers that read one input are compressed by one call of their method, to the same bits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_quant.calibrate import compress as module
from vdit_quant.calibrate.compress import compress_layer, compress_unit, read_layer
from vdit_quant.calibrate.model_source import StateDict
from vdit_quant.calibrate.pipeline import open_source, plan_source
from vdit_quant.calibrate.record import Recorder
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.recipe import Recipe
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.quantize.stats import LayerStats
from vdit_quant.runtime.family import find_family

CASES = [("viditq", "w4g64-a8tok"), ("hqdit", "wfp4-ae2m1tok"), ("hqdit", "we2m1g32-a8tok")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def found(
    request: pytest.FixtureRequest,
    tiny_dit: Callable[..., Any],
    dit_inputs: Callable[..., Any],
    tiny_folder: Path,
) -> tuple[Any, Any, Any]:
    """The source, the first block's layers, and what they see in a run."""
    source, (method, spec) = open_source(tiny_folder), request.param
    step = {"method": method, "spec": spec, "roles": ["attention", "feed_forward"]}
    plan = plan_source(source, Recipe.from_dict({"name": "test", "step": [step]}, "test"))
    model = tiny_dit()
    needs = {layer.name: layer.needs() for layer in plan.compressed}
    with Recorder(model, find_family(model), needs, 1) as recorder, torch.no_grad():
        model(**dit_inputs(model, batch=4))
    return source, plan.units()[0][1], recorder.result()


def test_query_key_and_value_are_compressed_in_one_call_to_the_same_bits(
    found: tuple[Any, Any, dict[str, LayerStats]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, layers, stats = found
    alone = {
        f"{plan.name}.{key}": t
        for plan in layers
        for key, t in compress_layer(plan, read_layer(plan.name, source.checkpoint, "cpu"), stats[plan.name]).items()
    }
    rows = []
    monkeypatch.setattr(module, "compress_layer", lambda p, *a: (rows.append((p.name, p.n)), compress_layer(p, *a))[1])
    together = compress_unit(layers, [], source.checkpoint, stats, "cpu")
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    query = next(plan for plan in layers if plan.name.endswith("to_q"))
    assert (query.name, 3 * query.n) in rows
    assert len(rows) == len(layers) - 2


def test_layers_of_one_input_but_of_several_specs_are_compressed_apart(
    found: tuple[Any, Any, dict[str, LayerStats]],
) -> None:
    _, layers, stats = found
    mixed = [
        dataclasses.replace(p, spec=LayerSpec.parse("w8-a8tok-h64")) if p.name.endswith("to_k") else p for p in layers
    ]
    groups = [[plan.name.rpartition(".")[2] for plan in group] for group in module.together(mixed, stats)]
    assert ["to_q", "to_v"] in groups
    assert ["to_k"] in groups


def test_a_bias_that_is_not_finite_is_refused() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 6))
    layer[0].bias.data[2] = torch.inf
    with pytest.raises(InputError, match="layer 0: 1 of 6 in its bias are NaN or infinite"):
        read_layer("0", StateDict(layer), "cpu")
