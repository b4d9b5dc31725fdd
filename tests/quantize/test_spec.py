"""Specs read the same from their short name, their JSON form and their parts."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_quant.quantize import formats, registry
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.spec import FormatSpec, HadamardSpec, LayerSpec

FORMATS = registry.names(formats)


def _formats() -> st.SearchStrategy[FormatSpec]:
    return st.sampled_from(FORMATS).flatmap(
        lambda name: st.sampled_from(list(registry.find(formats, name, "FORMAT").group_sizes)).map(
            lambda group: FormatSpec(name, group)
        )
    )


HADAMARDS = st.one_of(
    st.sampled_from([2, 16, 64, 128]).map(HadamardSpec),
    st.sampled_from([4, 16, 64, 256]).map(lambda size: HadamardSpec(size, "regular")),
)
SPECS = st.builds(
    LayerSpec,
    weight=_formats(),
    activation=st.none() | _formats(),
    pre_scale=st.booleans(),
    hadamard=st.none() | HADAMARDS,
    rank=st.integers(0, 256),
)


@settings(deadline=None, max_examples=150)
@given(SPECS)
def test_name_and_json_round_trip(spec: LayerSpec) -> None:
    assert LayerSpec.parse(spec.name) == spec
    assert LayerSpec.parse(spec.name.upper()) == spec
    data = json.loads(json.dumps(spec.to_dict()))
    assert LayerSpec.from_dict(data) == spec
    assert hash(LayerSpec.from_dict(data)) == hash(spec)


@settings(deadline=None, max_examples=60)
@given(SPECS, SPECS)
def test_different_specs_have_different_names(first: LayerSpec, second: LayerSpec) -> None:
    assert (first.name == second.name) == (first == second)


@settings(deadline=None, max_examples=40)
@given(SPECS)
def test_to_dict_leaves_defaults_out(spec: LayerSpec) -> None:
    assert set(spec.to_dict()) == {
        key for key in ("weight", "activation", "pre_scale", "hadamard", "rank") if getattr(spec, key)
    }


def test_the_documented_name() -> None:
    spec = LayerSpec.parse("w4g64-a8tok-s-h128-r32")
    assert spec == LayerSpec(FormatSpec("int4", 64), FormatSpec("int8"), True, HadamardSpec(128), 32)
    assert LayerSpec.parse(" w8 ") == LayerSpec(FormatSpec("int8"))


@pytest.mark.parametrize("name", ["", "4g64", "w", "w99", "w4g", "w4-", "w4-x", "w4-a99tok", "w4-h", "w4-r-1", "w4-hx"])
def test_a_name_that_cannot_be_read_is_quoted(name: str) -> None:
    with pytest.raises(InputError) as caught:
        LayerSpec.parse(name)
    assert f"'{name}'" in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [("wfp5-ae2m1tok", "fp4"), ("wvq4", "vq3"), ("w8-amxfp8g32", "mxfp4")])
def test_an_unknown_format_in_a_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"spec '{name}': unknown format .*did you mean '{near}'"):
        LayerSpec.parse(name)


@pytest.mark.parametrize("name", ["w4-s-s", "w4-r4-r8", "w4-h16-h32", "w4-a8tok-a8tok"])
def test_a_part_is_given_once(name: str) -> None:
    with pytest.raises(InputError, match="again"):
        LayerSpec.parse(name)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"weigth": {"format": "int8"}}, ("weigth", "did you mean 'weight'", "here")),
        ({"weight": {"fromat": "int8"}}, ("fromat", "did you mean 'format'", "here.weight")),
        ({"weight": {"format": "int88"}}, ("here.weight", "int88", "did you mean 'int8'")),
        ({}, ("here", "'weight' is missing")),
        ({"weight": {}}, ("here.weight", "'format' is missing")),
        ({"weight": {"format": "int8"}, "hadamard": {"block": 64}}, ("here.hadamard", "block", "block_size")),
        ({"weight": {"format": "int8"}, "hadamard": 64}, ("here.hadamard", "int")),
        ({"weight": {"format": "int8"}, "rank": 1.5}, ("here", "rank", "1.5")),
        ({"weight": {"format": "int8"}, "rank": True}, ("here", "rank")),
        ({"weight": {"format": "int8", "group_size": -64}}, ("here.weight", "group_size", "-64")),
    ],
)
def test_wrong_json_is_refused_with_its_place(data: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        LayerSpec.from_dict(data, "here")
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


VALUES = (
    -1, 0, 1, 1.5, float("nan"), "x", "3", "yes", "../int8", "__init__", None, True, [], {}, [1], {"a": 1}, {1: 2},
)  # fmt: skip
FIELDS = [
    ("weight",), ("weight", "format"), ("weight", "group_size"), ("activation",), ("activation", "format"),
    ("activation", "group_size"), ("pre_scale",), ("hadamard",), ("hadamard", "block_size"), ("hadamard", "kind"),
    ("rank",),
]  # fmt: skip


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_whatever_a_field_holds_it_is_read_or_one_clear_error(path: tuple[str, ...], value: Any) -> None:
    data: dict[str, Any] = {
        "weight": {"format": "int4", "group_size": 64},
        "activation": {"format": "int8", "group_size": 64},
        "hadamard": {"block_size": 16, "kind": "sylvester"},
        "pre_scale": True,
        "rank": 4,
    }
    table = data[path[0]] if len(path) == 2 else data
    table[path[-1]] = value
    try:
        spec = LayerSpec.from_dict(data, "here")
    except InputError as error:
        said = str(error)
    else:
        assert LayerSpec.from_dict(spec.to_dict()) == spec
        return
    assert said.startswith("here")
    assert all(key in said for key in path)
