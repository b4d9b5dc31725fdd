"""Recipes: every shipped one is usable, and what is misspelt is refused with the nearest valid name."""

from pathlib import Path
from typing import Any

import pytest

from vdit_quant.quantize import methods, registry
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.method import resolve_method
from vdit_quant.quantize.recipe import Recipe, load_shipped, shipped
from vdit_quant.quantize.spec import LayerSpec

STEP = {"kind": "quantize", "method": "rtn", "spec": "w4g64-a8tok", "roles": ["attention"]}


@pytest.mark.parametrize("bits", shipped())
def test_every_shipped_recipe_covers_a_whole_block(bits: str) -> None:
    recipe = load_shipped(bits)
    assert recipe.name == bits
    assert recipe.description
    for role in ("attention", "feed_forward", "modulation"):
        assert any(step.selects("blocks.0.x", role) for step in recipe.steps), f"{bits} leaves {role} at 16 bits"
    assert not any(step.selects("x_embedder", "embedder") for step in recipe.steps)
    assert Recipe.from_dict(recipe.to_dict(), "again") == recipe


def test_the_four_promised_recipes_ship() -> None:
    assert {"w8a8", "w4a8", "w4a16", "w8a16"} <= set(shipped())
    core = {bits: LayerSpec.parse(load_shipped(bits).steps[0].spec) for bits in ("w8a8", "w4a8", "w4a16", "w8a16")}
    assert {bits: spec.activation is not None for bits, spec in core.items()} == {
        "w8a8": True, "w4a8": True, "w4a16": False, "w8a16": False,
    }  # fmt: skip
    assert [core[bits].weight.format for bits in ("w8a8", "w4a8", "w4a16", "w8a16")] == ["int8", "int4", "int4", "int8"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"step": [{**STEP, "metod": "rtn"}]}, ("metod", "did you mean 'method'", "step 1")),
        ({"step": [STEP, {**STEP, "roles": ["atention"]}]}, ("atention", "did you mean 'attention'", "step 2")),
        ({"step": [{**STEP, "method": "rnt"}]}, ("rnt", "did you mean 'rtn'")),
        ({"step": [{**STEP, "kind": "quantise"}]}, ("quantise", "did you mean 'quantize'")),
        ({"step": [{**STEP, "spec": "x4"}]}, ("x4", "w4g64")),
        ({"step": [{**STEP, "params": {"clop": 1}}]}, ("clop", "did you mean 'clip'")),
        ({"step": [{**STEP, "kind": 3}]}, ("step 1", "kind", "string", "3")),
        ({"step": [{**STEP, "params": {"clip": "outptu"}}]}, ("step 1", "clip", "did you mean 'output'")),
        ({"step": [STEP], "name": 3}, ("mine.toml", "name", "string", "3")),
        ({"steps": [STEP]}, ("steps", "did you mean 'step'")),
        ({"step": []}, ("[[step]]",)),
        ({"step": ["rtn"]}, ("step 1", "str")),
        ({}, ("[[step]]",)),
    ],
)
def test_a_misspelt_recipe(data: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.from_dict(data, "mine.toml")
    message = str(caught.value)
    assert not [word for word in words if word not in message], message


def test_the_first_step_that_selects_a_layer_decides(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[step]]\nmethod = "rtn"\nspec = "w8"\ntargets = ["blocks.0.*"]\n'
        '[[step]]\nmethod = "rtn"\nspec = "w4"\nroles = ["attention"]\n',
        encoding="utf-8",
    )
    recipe = Recipe.from_toml(path)
    assert recipe.name == "mine"
    chosen = [next(s.spec for s in recipe.steps if s.selects(f"blocks.{i}.to_q", "attention")) for i in range(2)]
    assert chosen == ["w8", "w4"]


@pytest.mark.parametrize("method", registry.names(methods))
def test_another_method_keeps_every_spec(method: str) -> None:
    before, after = load_shipped("w4a8"), load_shipped("w4a8").with_method(method)
    found, params = resolve_method(method, {})
    for old, new in zip(before.steps, after.steps, strict=True):
        assert (new.spec, new.roles) == (old.spec, old.roles)
        if {"attention", "feed_forward"} & set(old.roles):
            assert (new.method, new.params) == (method, {})
        elif found.needs(params):
            assert new == old
        else:  # a run without data stays one
            assert new.method == method


def test_a_change_that_no_step_takes_is_refused() -> None:
    plain = {"method": "viditq", "spec": "w4g64-a8tok", "targets": ["blocks.*"]}
    recipe = Recipe.from_dict({"step": [plain]}, "mine")
    for option, change in (
        ("--set rotate=always", lambda: recipe.with_params(("rotate=always",))),
        ("--method gptq", lambda: recipe.with_method("gptq")),
    ):
        with pytest.raises(InputError, match=f"{option}.*attention or feed_forward.*mine"):
            change()
    assert recipe.with_method("rtn").steps[0].method == "rtn", "it is used for every step"


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="nothing"):
        load_shipped("w4a8").with_method("nothing")


def test_another_group_size_touches_grouped_weights_only() -> None:
    before, after = load_shipped("w4a8"), load_shipped("w4a8").with_group_size(32)
    for old, new in zip(before.steps, after.steps, strict=True):
        grouped = LayerSpec.parse(old.spec).weight.group_size is not None
        assert LayerSpec.parse(new.spec).weight.group_size == (32 if grouped else None)
        assert LayerSpec.parse(new.spec).activation == LayerSpec.parse(old.spec).activation


def test_an_unknown_shipped_name_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"w4a9.*did you mean 'w4a8'.*w8a8"):
        load_shipped("w4a9")
