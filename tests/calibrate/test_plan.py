"""The plan says what happens to every layer, with true bytes, before any weight is read."""

from collections.abc import Callable
from typing import Any

import pytest

from vdit_quant.calibrate.plan import make_plan
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.recipe import Recipe, load_shipped, shipped
from vdit_quant.runtime.family import find_family

Dit = Callable[..., Any]
W8 = {"method": "rtn", "spec": "w8", "targets": ["*.ff.net.2"]}


def _plan(model: Any, recipe: Recipe) -> Any:
    return make_plan(model, find_family(model), recipe)


@pytest.mark.parametrize("bits", shipped())
def test_every_layer_of_a_block_is_compressed_and_the_embedders_stay(bits: str, tiny_dit: Dit) -> None:
    plan = _plan(tiny_dit(), load_shipped(bits))
    kept = {layer.name for layer in plan.layers if layer.spec is None}
    assert {layer.role for layer in plan.compressed} == {"attention", "feed_forward", "modulation"}
    assert len(plan.compressed) == 14
    assert kept == {name for name in (layer.name for layer in plan.layers) if ".emb." in name or "proj_out" in name}
    assert all(layer.reason for layer in plan.layers)


def test_the_plan_needs_no_weights(tiny_dit: Dit) -> None:
    assert _plan(tiny_dit().to("meta"), load_shipped("w4a8")) == _plan(tiny_dit(), load_shipped("w4a8"))


def test_bytes_count_every_scale(tiny_dit: Dit) -> None:
    step = {"method": "rtn", "spec": "w4g64-a8tok", "roles": ["attention"]}
    plan = _plan(tiny_dit(), Recipe.from_dict({"step": [step]}, "mine"))
    layer = next(layer for layer in plan.layers if layer.name.endswith("0.attn1.to_q"))
    assert (layer.n, layer.k, layer.bytes_before) == (64, 64, 2 * 64 * 64)
    assert layer.bytes_after == 64 * 64 // 2 + 4 * 64 + 64  # codes, a row scale, one group of 64 a row
    kept = next(layer for layer in plan.layers if layer.spec is None)
    assert kept.bytes_after == kept.bytes_before


@pytest.mark.parametrize(
    ("written", "params", "is_open"),
    [
        ("w4g64-a8tok", {}, True),
        ("w4g64-a8tok", {"rotate": "always"}, False),
        ("w4g64-a8tok", {"hadamard": 0}, False),
        ("w4g64-a8tok-h64", {"hadamard": 0}, False),
    ],
)
def test_a_spec_is_open_where_the_rotation_is_searched_for(
    written: str, params: dict[str, Any], is_open: bool, tiny_dit: Dit
) -> None:
    step = {"method": "viditq", "spec": written, "roles": ["attention"], "params": params}
    plan = _plan(tiny_dit(), Recipe.from_dict({"step": [step]}, "mine"))
    assert {layer.is_open for layer in plan.compressed} == {is_open}
    assert not any(layer.is_open for layer in plan.layers if layer.spec is None)


def test_keep_wins_over_the_recipe(tiny_dit: Dit) -> None:
    recipe = load_shipped("w4a8").with_keep(("transformer_blocks.0.*", "*.to_v"))
    plan = _plan(tiny_dit(), recipe)
    assert len(plan.compressed) == 6
    assert {layer.block for layer in plan.compressed} == {"transformer_blocks.1"}
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert "*.to_v" in reasons["transformer_blocks.1.attn1.to_v"]


@pytest.mark.parametrize("pattern", ["no.such.layer", "transformer_blocks.2.*", "transformer_blocks"])
def test_a_keep_that_matches_nothing_is_an_error(pattern: str, tiny_dit: Dit) -> None:
    with pytest.raises(InputError, match="matches no layer") as caught:
        _plan(tiny_dit(), load_shipped("w4a8").with_keep((pattern,)))
    assert pattern in str(caught.value)
    assert "transformer_blocks.0" in str(caught.value)


def test_a_target_that_matches_nothing_is_an_error_that_names_the_nearest_layer(tiny_dit: Dit) -> None:
    steps = [
        {**W8, "targets": ["*.to_q", "transformer_block.[01].ff.*"]},
        {**W8, "targets": [], "roles": ["attention"]},
    ]
    with pytest.raises(
        InputError, match=r"recipe mine, step 1.*\[01\]\.ff.*matches no layer.*like \S*blocks\.\d\.ff\."
    ):
        _plan(tiny_dit(), Recipe.from_dict({"step": steps}, "mine"))


def test_the_first_step_that_selects_a_layer_decides(tiny_dit: Dit) -> None:
    steps = [W8, {"method": "rtn", "spec": "w4g64-a8tok", "roles": ["feed_forward"]}]
    plan = _plan(tiny_dit(), Recipe.from_dict({"step": steps}, "mine"))
    specs = {name: spec.name for name, spec in plan.specs().items()}
    assert {name: s for name, s in specs.items() if name.endswith("net.2")} == {
        f"transformer_blocks.{i}.ff.net.2": "w8" for i in range(2)
    }
    assert specs["transformer_blocks.0.ff.net.0.proj"] == "w4g64-a8tok"
    assert len(specs) == 4


def test_a_recipe_that_selects_nothing_says_what_there_is(tiny_dit: Dit) -> None:
    with pytest.raises(InputError, match=r"selects none of the 20.*attention.*feed_forward"):
        _plan(tiny_dit(), Recipe.from_dict({"step": [{**W8, "targets": [], "roles": ["other"]}]}, "mine"))


def test_work_is_cut_by_block_in_order(tiny_dit: Dit) -> None:
    units = _plan(tiny_dit(), load_shipped("w4a8")).units()
    assert [name for name, _ in units] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert all(layer.name.startswith(f"{name}.") for name, layers in units for layer in layers)
