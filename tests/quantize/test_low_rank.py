"""Low-rank branches: how they are found, and adapters that join them."""

import pytest
import torch
from torch import Tensor

from vdit_quant.quantize.compose import Choices, round_weight, split_low_rank
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.format import Tensors
from vdit_quant.quantize.layer import dense_weight, layer_layout, run_layer
from vdit_quant.quantize.low_rank import join_adapter
from vdit_quant.quantize.rotate import rotate_rows
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


@pytest.mark.parametrize("name", ["w4g16-r4", "w3-r4", "wfp4-r8", "w4g16-h64-r4"])
@pytest.mark.parametrize("branch", ["error", "weight"])
@pytest.mark.parametrize("weighted", [True, False])
def test_more_rounds_never_err_more(name: str, branch: str, weighted: bool) -> None:
    """Rounds come in the same order however many there are, so that the best of more is no worse."""
    spec, weight, x = LayerSpec.parse(name), _random(N, K, seed=0), _random(200, K, seed=5)
    x = x * torch.exp(_random(K, seed=6))
    gram = x.T @ x / len(x) if weighted else None
    signs = None if spec.hadamard is None else torch.ones(K, dtype=torch.int8)
    errors = []
    for rounds in range(1, 9):
        choices = Choices(branch=branch, rounds=rounds)
        tensors = split_low_rank(weight, gram, spec, choices, signs)
        down = tensors["proj_down"].float()
        if spec.hadamard is not None:
            assert signs is not None
            down = rotate_rows(down, signs, spec.hadamard)
        rest = weight - tensors["proj_up"].float() @ down
        stored = round_weight(rest, gram, spec, choices)
        assert all(torch.equal(t, tensors[key]) for key, t in stored.items())
        change = spec.weight.resolve().decode(stored, K, spec.weight) - rest
        errors.append(float(((change if gram is None else change @ gram) * change).double().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


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
