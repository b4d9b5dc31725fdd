"""Low-rank branches as the inputs see them, and adapters that join one."""

import pytest
import torch
from torch import Tensor

from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.format import Tensors
from vdit_quant.quantize.layer import dense_weight, layer_layout, run_layer
from vdit_quant.quantize.low_rank import join_adapter, weighted_low_rank
from vdit_quant.quantize.spec import LayerSpec

N, K = 48, 64


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _layer(name: str) -> tuple[Tensors, LayerSpec]:
    spec = LayerSpec.parse(name)
    tensors = spec.weight.resolve().encode(_random(N, K, seed=0), spec.weight)
    more = {
        "pre_quant_scale": 2.0 ** torch.randint(-2, 3, (K,)),
        "hadamard_signs": torch.randint(0, 2, (K,)).to(torch.int8) * 2 - 1,
        "proj_down": _random(spec.rank, K).bfloat16(),
        "proj_up": _random(N, spec.rank).bfloat16(),
    }
    layout = layer_layout(N, K, spec)
    return {**tensors, **{name: t for name, t in more.items() if name in layout}}, spec


@pytest.mark.parametrize("name", ["w8", "w4g64-a8tok", "w4g64-a8tok-h64-r4", "wfp4-ae2m1tok-s-h64-r8"])
def test_an_adapter_joins_exactly(name: str) -> None:
    tensors, spec = _layer(name)
    down, up = _random(4, K, seed=2).bfloat16().float(), _random(N, 4, seed=3).bfloat16().float()
    joined, wider = join_adapter(tensors, spec, down, up, scale=0.5)
    assert wider.rank == spec.rank + 4
    assert {key: t.shape for key, t in joined.items()} == {
        key: layout.shape for key, layout in layer_layout(N, K, wider).items()
    }
    want = dense_weight(tensors, K, spec) + 0.5 * up @ down
    torch.testing.assert_close(dense_weight(joined, K, wider), want, rtol=1e-5, atol=1e-5)
    x = _random(7, K, seed=4)
    want = run_layer(x, tensors, spec, None) + 0.5 * x @ down.T @ up.T
    torch.testing.assert_close(run_layer(x, joined, wider, None), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("down", "up"), [((4, K), (N, 5)), ((4, K + 1), (N, 4)), ((4, K), (N + 1, 4)), ((60, K), (N, 60))]
)
def test_an_adapter_of_another_layer_is_refused(down: tuple[int, int], up: tuple[int, int]) -> None:
    tensors, spec = _layer("w8-a8tok")
    with pytest.raises(InputError, match="adapter"):
        join_adapter(tensors, spec, torch.zeros(down), torch.zeros(up))


@pytest.mark.parametrize("below", [1e-3, 1e-1])
def test_a_gram_matrix_that_rounding_left_indefinite_is_damped_until_it_serves(below: float) -> None:
    turn = torch.linalg.qr(_random(K, K, seed=5))[0]
    sizes = torch.linspace(0.5, 1.5, K)
    sizes[0] = -below
    gram = turn @ sizes.diag() @ turn.T
    matrix = _random(N, 3, seed=6) @ _random(3, K, seed=7)
    up, down = weighted_low_rank(matrix, gram, 3)
    torch.testing.assert_close(up @ down, matrix, rtol=1e-3, atol=1e-3)


def test_what_is_no_gram_matrix_is_refused() -> None:
    for gram, word in ((torch.full((K, K), torch.nan), "NaN"), (torch.eye(K) - torch.ones(K, K), "positive definite")):
        with pytest.raises(InputError, match=word):
            weighted_low_rank(_random(N, K), gram, 3)
