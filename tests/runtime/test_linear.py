"""The compressed layer behaves as an `nn.Linear` whose stored tensors nothing changes."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdit_quant.quantize.layer import layer_bytes, run_layer
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.linear import CompressedLinear

N, K = 48, 64
Make = Callable[..., dict[str, Tensor]]
Ratio = Callable[[Tensor, Tensor], float]


def _layer(spec: LayerSpec, tensors: dict[str, Tensor], bias: bool = True) -> CompressedLinear:
    layer = CompressedLinear(K, N, spec, bias=bias)
    layer.load_tensors(tensors, torch.linspace(-1, 1, N) if bias else None)
    return layer


def _same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    same = (
        t.dtype == want[k].dtype and torch.equal(t.view(torch.uint8), want[k].view(torch.uint8)) for k, t in got.items()
    )
    return got.keys() == want.keys() and all(same)


def test_it_is_a_linear_built_from_a_spec_alone(spec: LayerSpec) -> None:
    layer = CompressedLinear(K, N, spec, device="meta", dtype=torch.bfloat16)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert all(t.device.type == "meta" for t in layer.state_dict().values())
    assert sum(t.numel() * t.element_size() for t in layer.buffers()) == layer_bytes(N, K, spec)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert spec.name in repr(layer)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casting_moves_the_bias_and_nothing_that_is_stored(cast: str, spec: LayerSpec, random_layer: Make) -> None:
    tensors = random_layer(N, K, spec)
    layer = getattr(_layer(spec, tensors), cast)()
    assert _same(layer.tensors(), tensors)
    assert layer.bias.dtype == {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}.get(
        cast, torch.float32
    )


def test_casting_a_whole_model_keeps_what_is_stored(spec: LayerSpec, random_layer: Make) -> None:
    tensors = random_layer(N, K, spec)
    model = nn.Sequential(_layer(spec, tensors), nn.Linear(N, 4)).to("cpu", torch.bfloat16)
    assert _same(model[0].tensors(), tensors)
    assert model(torch.randn(3, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_and_deepcopy_round_trip(spec: LayerSpec, random_layer: Make) -> None:
    layer, x = _layer(spec, random_layer(N, K, spec)), torch.randn(5, K)
    fresh = CompressedLinear(K, N, spec)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert set(layer.state_dict()) == {*layer.tensors(), "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_leading_shape_and_dtype(dtype: torch.dtype, spec: LayerSpec, random_layer: Make) -> None:
    layer = _layer(spec, random_layer(N, K, spec)).to(dtype)
    x = torch.randn(2, 3, 5, K).to(dtype)
    y = layer(x)
    assert y.shape == (2, 3, 5, N)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.reshape(-1, K)).reshape(2, 3, 5, N))
    assert torch.equal(layer(x[0, 0, 0]), layer(x[0, 0, :1])[0])


@pytest.mark.parametrize("name", ["w8-amxfp4g32", "w8-anvfp4g16", "w8-ae2m1g16", "w8-a4g64", "w8-af8tok"])
def test_no_rows_in_a_format_that_is_simulated(name: str, random_layer: Make) -> None:
    layer_spec = LayerSpec.parse(name)
    assert run_layer(torch.randn(0, 64), random_layer(40, 64, layer_spec), layer_spec, None).shape == (0, 40)


def test_no_rows_give_no_rows(spec: LayerSpec, random_layer: Make) -> None:
    assert _layer(spec, random_layer(N, K, spec))(torch.randn(2, 0, K)).shape == (2, 0, N)


def test_the_bias_is_added_once(spec: LayerSpec, random_layer: Make) -> None:
    tensors, x = random_layer(N, K, spec), torch.randn(7, K)
    bare = _layer(spec, tensors, bias=False)
    assert bare.bias is None
    assert set(bare.state_dict()) == set(tensors)
    torch.testing.assert_close(_layer(spec, tensors)(x), bare(x) + torch.linspace(-1, 1, N), rtol=1e-4, atol=1e-4)


def test_zero_input_gives_the_bias(spec: LayerSpec, random_layer: Make) -> None:
    y = _layer(spec, random_layer(N, K, spec))(torch.zeros(3, K))
    assert torch.equal(y, torch.linspace(-1, 1, N).expand(3, N))


def test_the_output_is_that_of_the_dense_weight(spec: LayerSpec, random_layer: Make, sqnr: Ratio) -> None:
    layer, x = _layer(spec, random_layer(N, K, spec), bias=False), torch.randn(64, K)
    exact = F.linear(x, layer.dequantized())
    # float activations are exact up to rounding; 8 bits a token leave about 40 dB
    assert sqnr(layer(x), exact) > (90 if spec.activation is None else 33)


def test_the_layer_runs_its_definition(spec: LayerSpec, random_layer: Make) -> None:
    tensors, x = random_layer(N, K, spec), torch.randn(9, K)
    assert torch.equal(_layer(spec, tensors, bias=False)(x), run_layer(x, tensors, spec, None))


def test_a_missing_tensor_is_an_error(spec: LayerSpec, random_layer: Make) -> None:
    tensors = random_layer(N, K, spec)
    for name in tensors:
        with pytest.raises(KeyError, match=name):
            CompressedLinear(K, N, spec).load_tensors({k: t for k, t in tensors.items() if k != name})
