"""`act_quant` on any device: which half is the gate, what the transform does, and that fusing loses nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_quant.kernels.act_quant import ACTS, act_quant
from vdit_quant.kernels.hadamard import hadamard, hadamard_matrix
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.kernels.quant_token_fp4 import quant_token_fp4

M, K = 7, 192


def formula(x: Tensor, act: str) -> Tensor:
    """The activations by their formulas in float64."""
    x = x.double()
    if act in ("swiglu", "geglu"):
        hidden, gate = x.chunk(2, dim=1)
        return hidden * formula(gate, {"swiglu": "silu", "geglu": "gelu"}[act])
    return {
        "none": lambda: x,
        "gelu": lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "silu": lambda: x / (1 + torch.exp(-x)),
    }[act]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ACTS)
def test_codes_and_scales_follow_the_formula(act: str, dtype: torch.dtype) -> None:
    x = (torch.randn(M, K * 2) * 3).to(dtype)
    codes, scale = act_quant(x, act, None, None, 0, "")
    want = formula(x, act)
    amax = want.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double(), (amax / 127).squeeze(1), rtol=1e-5, atol=0)
    assert (codes - want * 127 / amax).abs().max() < 0.5 + 1e-3


@pytest.mark.parametrize(("kind", "act"), [("SwiGLU", "swiglu"), ("GEGLU", "geglu")])
def test_the_gate_is_the_half_that_diffusers_takes(kind: str, act: str) -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    module = getattr(activations, kind)(16, 32).eval()
    x = torch.randn(M, 16)
    with torch.no_grad():
        codes, scale = act_quant(module.proj(x), act, None, None, 0, "")
        want = module(x)
    assert ((codes * scale[:, None] - want).abs() <= 0.501 * scale[:, None]).all()


def test_without_an_activation_it_is_scale_rotation_and_quant_token() -> None:
    x = torch.randn(M, 3 * K)[:, K : 2 * K]
    pre_scale = torch.rand(K) + 0.5
    signs = (torch.randint(2, (K,)) * 2 - 1).to(torch.int8)
    for size, kind in ((64, "regular"), (32, "sylvester")):
        got = act_quant(x, "none", pre_scale, signs, size, kind)
        for mine, want in zip(got, quant_token(hadamard(x * pre_scale, signs, size, kind)), strict=True):
            assert torch.equal(mine, want)
    for mine, want in zip(act_quant(x, "none", None, None, 0, ""), quant_token(x), strict=True):
        assert torch.equal(mine, want)


def test_fusing_is_more_accurate_than_a_bfloat16_chain(relative_rms) -> None:
    x = (torch.randn(64, K) * 2).bfloat16()
    pre_scale = torch.rand(K) + 0.5
    h = torch.block_diag(*[hadamard_matrix(64, "sylvester")] * 3).double() / 8
    want = (formula(x, "gelu_tanh") * pre_scale) @ h
    chain = F.gelu(x, approximate="tanh") * pre_scale.bfloat16()
    pairs = (
        act_quant(x, "gelu_tanh", pre_scale, None, 64, "sylvester"),
        quant_token(hadamard(chain, None, 64, "sylvester")),
    )
    fused, unfused = (relative_rms(codes.double() * scale.double()[:, None], want) for codes, scale in pairs)
    assert fused <= unfused


def test_fp8_codes_use_the_whole_range() -> None:
    codes, scale = act_quant(torch.randn(M, K), "silu", None, None, 0, "", "fp8")
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.float().abs().amax(1), torch.full((M,), 448.0))
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize(("out", "group"), [("fp4", 0), ("fp4g16", 16), ("fp4g64", 64)])
def test_fp4_is_quant_token_fp4_of_what_the_layer_reads(out: str, group: int) -> None:
    x, pre_scale, signs = torch.randn(M, K), torch.rand(K) + 0.5, (torch.randint(2, (K,)) * 2 - 1).to(torch.int8)
    want = quant_token_fp4(hadamard(F.silu(x) * pre_scale, signs, 64, "regular"), group)
    for mine, other in zip(act_quant(x, "silu", pre_scale, signs, 64, "regular", out), want, strict=True):
        assert torch.equal(mine, other)


def test_errors_name_what_was_expected_and_found() -> None:
    x = torch.randn(3, 65)
    for args, message in (
        (("relu", None, None, 0, ""), "act to be one of none, gelu"),
        (("swiglu", None, None, 0, ""), "two halves for swiglu, found 65 columns"),
        (("none", None, None, 0, "", "int4"), "out to be one of int8, fp8, fp4, .*, found 'int4'"),
        (("none", torch.ones(64), None, 0, ""), r"pre_scale torch.float32 of shape \(65,\)"),
        (("none", None, torch.ones(65, dtype=torch.int8), 0, ""), "a block_size with signs"),
        (("none", None, None, 16, "sylvester"), "K to be a multiple of block_size 16"),
        (("none", None, None, 0, "", "fp4g16"), "K to be a multiple of the group 16"),
    ):
        with pytest.raises(ValueError, match=f"act_quant: expected .*{message}"):
            act_quant(x, *args)
