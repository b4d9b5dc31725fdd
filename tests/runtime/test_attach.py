"""Swapping layers in and out of a model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.attach import attach, detach, linear_layers
from vdit_quant.runtime.linear import CompressedLinear

Make = Callable[..., dict[str, Tensor]]
NAMES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2")


def _attached(model: Any, spec: LayerSpec, random_layer: Make) -> dict[str, Any]:
    layers = linear_layers(model)
    sizes = {name: (layers[name].out_features, layers[name].in_features) for name in NAMES}
    tensors = {name: random_layer(n, k, spec) for name, (n, k) in sizes.items()}
    return attach(model, dict.fromkeys(NAMES, spec), tensors)


@torch.no_grad()
def test_detach_restores_the_model_bit_for_bit(
    spec: LayerSpec, random_layer: Make, tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any]
) -> None:
    model = tiny_dit()
    inputs, state = dit_inputs(model), {k: t.clone() for k, t in model.state_dict().items()}
    before = model(**inputs).sample
    originals = _attached(model, spec, random_layer)
    assert {name for name, m in model.named_modules() if isinstance(m, CompressedLinear)} == set(NAMES)
    assert not torch.equal(model(**inputs).sample, before)
    detach(model, originals)
    assert torch.equal(model(**inputs).sample, before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_the_bias_and_training_mode_are_taken_over(tiny_dit: Callable[..., Any], random_layer: Make) -> None:
    model = tiny_dit()
    bias = model.get_submodule(NAMES[0]).bias.detach().clone()
    _attached(model, LayerSpec.parse("w8-a8tok"), random_layer)
    layer = model.get_submodule(NAMES[0])
    assert torch.equal(layer.bias, bias)
    assert not layer.training


def test_without_tensors_the_layers_are_empty_on_the_same_device(tiny_dit: Callable[..., Any]) -> None:
    model = tiny_dit().to("meta")
    attach(model, dict.fromkeys(NAMES, LayerSpec.parse("w4g64-a8tok")))
    assert {t.device.type for t in model.get_submodule(NAMES[0]).state_dict().values()} == {"meta"}


def test_an_unknown_name_suggests_the_nearest(tiny_dit: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"to_qq.*did you mean 'transformer_blocks\.0\.attn1\.to_q'"):
        attach(tiny_dit(), {"transformer_blocks.0.attn1.to_qq": LayerSpec.parse("w8")})


def test_a_shape_that_does_not_fit_names_the_layer(tiny_dit: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.attn1\.to_q.*128 does not divide K = 64"):
        attach(tiny_dit(), {NAMES[0]: LayerSpec.parse("w4g128")})
