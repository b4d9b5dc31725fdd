"""Ternary weights: codes of every shape, scales of both signs, and the grid that rounding finds again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_quant.quantize.format import ScalarFormat
from vdit_quant.quantize.formats.ternary import FORMAT
from vdit_quant.quantize.layer import run_layer
from vdit_quant.quantize.spec import FormatSpec, LayerSpec

SPEC = FormatSpec("ternary")


def _codes(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, (n, k), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 6), k=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_codes_come_back_for_every_width(n: int, k: int, seed: int) -> None:
    codes = _codes(n, k, seed)
    packed = FORMAT.pack(codes)
    assert packed.shape == (n, (k + 3) // 4)
    assert torch.equal(FORMAT.unpack(packed, k), codes)
    assert torch.equal(FORMAT.to_int8({"weight": packed, "weight_scale": torch.ones(n)}, k, SPEC)[0], codes)


@pytest.mark.parametrize("activation", ["", "-a8tok", "-ae2m1tok"])
def test_the_scale_keeps_its_sign(activation: str) -> None:
    codes, scale = _codes(24, 64), torch.linspace(-0.5, 0.5, 24)
    spec = LayerSpec.parse(f"wt{activation}")
    tensors = FORMAT.store(codes, {"weight_scale": scale})
    assert torch.equal(FORMAT.decode(tensors, 64, spec.weight), codes * scale[:, None])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    flipped = {**tensors, "weight_scale": -scale}
    y = run_layer(x, tensors, spec, None)
    assert torch.equal(run_layer(x, flipped, spec, None), -y)
    if not activation:
        torch.testing.assert_close(y, x @ (codes * scale[:, None]).T)


def test_rounding_again_finds_the_grid_of_a_trained_weight() -> None:
    weight = _codes(32, 256) * torch.linspace(0.01, 3, 32)[:, None]
    weight[3, 1:] = 0
    torch.testing.assert_close(FORMAT.decode(FORMAT.encode(weight, SPEC), 256, SPEC), weight, rtol=1e-6, atol=0)


def test_error_on_a_gaussian_weight(sqnr) -> None:
    weight = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))
    assert isinstance(FORMAT, ScalarFormat)
    assert sqnr(FORMAT.decode(FORMAT.encode(weight, SPEC), 1152, SPEC), weight) == pytest.approx(7.2, abs=0.1)
