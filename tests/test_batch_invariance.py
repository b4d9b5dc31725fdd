"""A sample's output does not depend on what else is in its batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

import vdit_quant
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.linear import CompressedLinear

N, K = 96, 128


@pytest.mark.parametrize("name", ["w8-a8tok", "w4g64-a8tok", "w4-a8tok"])
@pytest.mark.parametrize("batch", [2, 17, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bit_equal_alone_and_in_a_batch(
    name: str, batch: int, dtype: torch.dtype, random_layer: Callable[..., dict[str, Tensor]]
) -> None:
    spec = LayerSpec.parse(name)
    layer = CompressedLinear(K, N, spec)
    layer.load_tensors(random_layer(N, K, spec), torch.randn(N))
    x = torch.randn(batch, K) * torch.logspace(-3, 3, batch)[:, None]  # loud neighbours must not matter
    x = x.to(dtype)
    together = layer(x)
    for row in {0, 1, batch // 2, batch - 1}:
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
@torch.no_grad()
def test_a_sample_does_not_feel_its_neighbours(
    bits: str, demo_artifact: Callable[..., Path], dit_inputs: Callable[..., dict[str, Any]]
) -> None:
    model = vdit_quant.load(demo_artifact(bits), device="cpu", dtype=torch.float32).transformer
    inputs = dit_inputs(model, batch=8)
    together = model(**inputs).sample
    for i in (0, 3, 7):
        others = 30 * torch.randn_like(inputs["hidden_states"])
        others[i] = inputs["hidden_states"][i]
        assert torch.equal(model(**{**inputs, "hidden_states": others}).sample[i], together[i])


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
@torch.no_grad()
def test_a_sample_alone_differs_by_less_than_compression_does(
    bits: str,
    demo: Path,
    demo_artifact: Callable[..., Path],
    dit_inputs: Callable[..., dict[str, Any]],
    sqnr: Callable[..., float],
) -> None:
    """Every compressed layer is exact in any batch, but torch's float32 attention and matmuls sum in an order that
    depends on the batch size. That 1e-7 can flip a code here and there, so whole models agree to about 50 dB."""
    model = vdit_quant.load(demo_artifact(bits), device="cpu", dtype=torch.float32).transformer
    exact = DiTTransformer2DModel.from_pretrained(demo / "transformer", torch_dtype=torch.float32)
    inputs = dit_inputs(model, batch=8)
    together = model(**inputs).sample
    singles = [{name: t[i : i + 1] for name, t in inputs.items()} for i in range(8)]
    alone = torch.cat([model(**single).sample for single in singles])
    assert sqnr(alone, together) > 44
    assert sqnr(alone, together) > sqnr(together, exact(**inputs).sample) + 1
