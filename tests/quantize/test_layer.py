"""A layer's definition and its dense weight agree, whatever the spec is made of."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.layer import check_shape, dense_weight, layer_bytes, layer_layout, run_layer
from vdit_quant.quantize.spec import LayerSpec

N, K = 40, 64
Make = Callable[..., dict[str, Tensor]]


def test_the_dense_weight_is_what_the_layer_multiplies_by(
    spec: LayerSpec, random_layer: Make, sqnr: Callable[..., float]
) -> None:
    exact = replace(spec, activation=None)
    tensors, x, bias = random_layer(N, K, exact), torch.randn(33, K), torch.randn(N)
    dense = dense_weight(tensors, K, exact)
    assert dense.dtype == torch.float32
    assert sqnr(run_layer(x, tensors, exact, bias), F.linear(x, dense, bias)) > 90


def test_bytes_are_those_of_the_tensors(spec: LayerSpec, random_layer: Make) -> None:
    tensors = random_layer(N, K, spec)
    assert layer_bytes(N, K, spec) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert set(layer_layout(N, K, spec)) == set(tensors)


def test_quantised_activations_do_not_mix_rows(spec: LayerSpec, random_layer: Make) -> None:
    tensors, x = random_layer(N, K, spec), torch.randn(6, K)
    loud = x.clone()
    loud[3] *= 1000
    y, other = run_layer(x, tensors, spec, None), run_layer(loud, tensors, spec, None)
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(y[keep], other[keep])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w4g128", "group size 128 does not divide K = 64"),
        ("w4g64-a4g128", "group size 128 does not divide K = 64"),
        ("w8-avq2tok", "format vq2 has one weight_codebook for all rows"),
        ("w8-h128", "Hadamard block 128 does not divide K = 64"),
        ("w8-r41", "rank 41 exceeds the smaller side"),
    ],
)
def test_a_shape_that_does_not_fit_names_the_layer(name: str, words: str) -> None:
    with pytest.raises(InputError, match=f"layer my.layer.*{words}"):
        check_shape(N, K, LayerSpec.parse(name), "my.layer")
