"""The contract of every compression method, found by file name: a new one is tested without touching this file."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_quant.calibrate.mixed import CANDIDATES
from vdit_quant.quantize import methods, registry
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.format import Tensors
from vdit_quant.quantize.layer import layer_layout, run_layer, settled_spec
from vdit_quant.quantize.method import FloatLayer, resolve_method
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.quantize.stats import KINDS, LayerStats

N, K = 48, 128
SPECS = ("w4g64-a8tok", "w4g32", "w8-a8tok")
NAMES = registry.names(methods)


def _inputs(rows: int, seed: int) -> Tensor:
    """Correlated rows with a few large channels, as the inputs of a DiT's layers have them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(99)) / K**0.5
    x = torch.randn(rows, K, generator=generator) @ (torch.eye(K) + mix)
    x[:, [3, 50, 101]] *= 12
    return x


def _layer() -> FloatLayer:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(N, K, generator=generator) * 0.05
    weight[7, 20] = 1.0
    return FloatLayer("blocks.0.attn.to_q", weight, torch.randn(N, generator=generator))


def _stats(needs: frozenset[str]) -> LayerStats | None:
    if not needs:
        return None
    stats = LayerStats.empty(K, needs, bins=4)
    for step in range(4):
        for branch in range(2):
            stats.update(_inputs(64, 2 * step + branch), step, branch, keep=16 if "rows" in needs else 0)
    return stats.finish()


def _compress(name: str, spec_name: str, **given: Any) -> tuple[LayerSpec, Tensors]:
    method, params = resolve_method(name, given)
    spec = method.complete(LayerSpec.parse(spec_name), N, K, params)
    with torch.no_grad():
        tensors = method.compress(_layer(), _stats(method.needs(params)), spec, **params)
    return settled_spec(spec, tensors) if params.get("rotate") == "search" else spec, tensors


def _error(spec: LayerSpec, tensors: Tensors) -> float:
    """Relative error of the layer's output on inputs that the statistics have not seen."""
    x, layer = _inputs(256, 1000), _layer()
    want = x @ layer.weight.T
    return float((run_layer(x, tensors, spec, None) - want).norm() / want.norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec_name", SPECS)
def test_the_output_is_what_the_spec_says(name: str, spec_name: str) -> None:
    spec, tensors = _compress(name, spec_name)
    expected = {key: (layout.shape, layout.dtype) for key, layout in layer_layout(N, K, spec).items()}
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == expected
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
    assert LayerSpec.parse(spec.name) == spec


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec_name", SPECS)
def test_the_output_is_deterministic(name: str, spec_name: str) -> None:
    (_, first), (_, second) = _compress(name, spec_name), _compress(name, spec_name)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec_name", SPECS)
def test_it_is_no_worse_than_rounding_to_nearest(name: str, spec_name: str) -> None:
    assert _error(*_compress(name, spec_name)) < 1.1 * _error(*_compress("rtn", spec_name)) + 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_callers_tensors_are_not_changed(name: str) -> None:
    method, params = resolve_method(name, {})
    spec = method.complete(LayerSpec.parse("w4g64-a8tok"), N, K, params)
    layer, stats = _layer(), _stats(method.needs(params))
    before = {} if stats is None else {key: t.clone() for key, t in stats.to_tensors().items()}
    with torch.no_grad():
        method.compress(layer, stats, spec, **params)
    assert torch.equal(layer.weight, _layer().weight)
    assert all(torch.equal(t, before[key]) for key, t in ({} if stats is None else stats.to_tensors()).items())


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_needs_is_something_calibration_records(name: str) -> None:
    method, params = resolve_method(name, {})
    assert method.needs(params) <= set(KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_weight_stays_zero(name: str) -> None:
    method, params = resolve_method(name, {})
    spec = method.complete(LayerSpec.parse("w4g64-a8tok"), N, K, params)
    with torch.no_grad():
        tensors = method.compress(FloatLayer("x", torch.zeros(N, K)), _stats(method.needs(params)), spec, **params)
        y = run_layer(_inputs(8, 3), tensors, spec, None)
    assert torch.isfinite(y).all()
    assert float(y.abs().max()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_dead_input_channel_does_no_harm(name: str) -> None:
    method, params = resolve_method(name, {})
    needs = method.needs(params)
    spec = method.complete(LayerSpec.parse("w4g64-a8tok"), N, K, params)
    stats = _stats(needs)
    if stats is not None:
        x = _inputs(64, 0)
        x[:, 10:20] = 0
        stats = LayerStats.empty(K, needs)
        stats.update(x, 0, 0, keep=16 if "rows" in needs else 0)
        stats.finish()
    with torch.no_grad():
        tensors = method.compress(_layer(), stats, spec, **params)
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
    assert _error(spec, tensors) < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_parameter_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"parameter of {name} 'no_such_parameter'"):
        resolve_method(name, {"no_such_parameter": 1})


@pytest.mark.parametrize("name", NAMES)
def test_a_word_that_is_no_choice_is_refused_before_anything_is_compressed(name: str) -> None:
    method, params = resolve_method(name, {})
    for key in [key for key, default in params.items() if isinstance(default, str)]:
        expected = "expected int or auto" if key in method.autos else f"value of {key} 'no_such_word'"
        with pytest.raises(InputError, match=expected):
            resolve_method(name, {key: "no_such_word"})


NUMBERS = {"alpha": 0.9, "damp": 0.5, "sweeps": 2, "rounds": 2, "hadamard": 16, "rank": 8}
AT_RUN_TIME = {"fold", "steps", "candidates", "ratio", "harden", "slope", "rate", "book_rate"}
"""Parameters that a single layer's compression does not see."""


def _another(name: str, key: str, value: Any) -> Any:
    """Another value of a parameter."""
    if isinstance(value, bool):
        return not value
    words = resolve_method(name, {})[0].choices.get(key, ())
    return next((word for word in words if word != value), NUMBERS.get(key))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec_name", ["w4g64-a8tok", "w8", "wfp4-ae2m1g16", "wnf4g64", "wvq2", "wt-a8tok", "w16"])
def test_a_parameter_that_is_called_unused_changes_nothing(name: str, spec_name: str) -> None:
    method, params = resolve_method(name, {})
    is_rounding = spec_name == SPECS[0] and params.get("rounding") == "gptq" and name != "vq4dit"
    for context in [{}, {"rounding": "rtn"}] if is_rounding else [{}]:
        spec, tensors = _compress(name, spec_name, **context)
        given = {**params, **context}
        unused = method.unused(method.complete(LayerSpec.parse(spec_name), N, K, given), given)
        for key in unused - AT_RUN_TIME:
            other_spec, others = _compress(name, spec_name, **{**context, key: _another(name, key, given[key])})
            assert other_spec == spec, key
            assert all(torch.equal(tensor, others[part]) for part, tensor in tensors.items()), key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_changes_something_somewhere(name: str) -> None:
    method, params = resolve_method(name, {})
    waiting = set(params) - AT_RUN_TIME
    for spec_name in ("w4g64-a8tok-h16-r4", "w4g64-a8tok", "wfp4-ae2m1tok", "wvq2"):
        for context in ({}, {"smooth": "fixed"}):
            if set(context) - set(params):
                continue
            given = {**params, **context}
            _, tensors = _compress(name, spec_name, **context)
            unused = method.unused(method.complete(LayerSpec.parse(spec_name), N, K, given), given)
            for key in waiting - unused - set(context):
                _, others = _compress(name, spec_name, **{**context, key: _another(name, key, given[key])})
                same = tensors.keys() == others.keys() and all(map(torch.equal, tensors.values(), others.values()))
                waiting -= set() if same else {key}
    assert not waiting


def test_an_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'rtm'.*did you mean 'rtn'"):
        resolve_method("rtm", {})


@pytest.mark.parametrize("clip", ["weight", "output"])
@pytest.mark.parametrize("spec_name", ["w4g64", "w4", "w8"])
def test_clipping_lowers_the_error_it_is_searched_for(clip: str, spec_name: str) -> None:
    importance = torch.ones(K) if clip == "weight" else _inputs(512, 4).square().mean(0)

    def loss(**params: Any) -> float:
        spec, tensors = _compress("rtn", spec_name, **params)
        decoded = spec.weight.resolve().decode(tensors, K, spec.weight)
        return float(((decoded - _layer().weight).square() * importance).sum())

    assert loss(clip=clip) <= loss() * (1 if clip == "weight" else 1.02)
    if spec_name == "w4":
        assert loss(clip=clip) < 0.95 * loss()


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_of_a_budget_fits_and_more_bits_of_a_kind_are_better(name: str) -> None:
    """A plan under a budget has the recipe's one method for whatever a layer gets."""
    errors = {candidate: _error(*_compress(name, f"{candidate}-a8tok")) for candidate in CANDIDATES}
    for is_codebook in (True, False):
        own = [error for candidate, error in errors.items() if ("vq" in candidate) == is_codebook]
        assert len(own) > 1
        assert own == sorted(own, reverse=True)
    assert max(errors.values()) < 0.3


@pytest.mark.parametrize("name", [name for name in NAMES if resolve_method(name, {})[0].by_rows])
@pytest.mark.parametrize("spec_name", ["w4g64-a8tok", "w3g64", "w2g64", "w8", "wf8-af8tok", "wnf4g64", "wt"])
def test_a_method_that_goes_by_rows_gives_a_row_the_same_bits_among_other_rows(name: str, spec_name: str) -> None:
    method, params = resolve_method(name, {})
    params = {
        **params,
        **({"rank": 0} if "rank" in params else {}),
        **({"smooth": "none"} if "smooth" in params else {}),
        **({"rotate": "always"} if "rotate" in params else {}),
    }
    layer, other = _layer(), FloatLayer("other", torch.randn(80, K, generator=torch.Generator().manual_seed(8)))
    spec = method.complete(LayerSpec.parse(spec_name), N, K, params)
    assert spec.weight.resolve().by_rows
    stats = _stats(method.needs(params))
    with torch.no_grad():
        alone = method.compress(FloatLayer(layer.name, layer.weight), stats, spec, **params)
        joint = FloatLayer("both", torch.cat((other.weight, layer.weight)))
        among = method.compress(joint, stats, spec, **params)
    for key in spec.weight.resolve().layout(N, K, spec.weight):
        assert torch.equal(among[key][80:].float(), alone[key].float()), key  # float8 has no `equal`
