"""`norm_quant` and `gate_norm_quant` on any device: what they compute, and that fusing loses nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_quant.kernels.hadamard import hadamard, hadamard_matrix
from vdit_quant.kernels.norm_quant import (
    NORM_QUANT,
    gate_norm_quant,
    gate_norm_quant_fp8,
    norm_quant,
    norm_quant_fp8,
)
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.kernels.quant_token_fp4 import quant_token_fp4

M, K, B = 24, 192, 3
PLAIN = ("layer", 1e-6, 0, "")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def codes_of(x: Tensor, limit: float = 127.0) -> tuple[Tensor, Tensor]:
    """Float64 codes before rounding, and scales."""
    amax = x.abs().amax(1, keepdim=True)
    return x * limit / amax, (amax / limit).squeeze(1)


def truth(x: Tensor, mod: list[Tensor], affine: list[Tensor], kind: str, eps: float) -> Tensor:
    """The norm and modulation by their formulas, row by row, in float64."""
    x = x.double()
    centred = x - x.mean(1, keepdim=True) if kind == "layer" else x
    y = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
    if affine:
        y = y * affine[0].double()
    if len(affine) > 1:
        y = y + affine[1].double()
    if mod:
        tokens = len(x) // len(mod[0])
        y = torch.stack([row * (1 + mod[1][m // tokens].double()) + mod[0][m // tokens] for m, row in enumerate(y)])
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("with_mod", "affine"), [(False, 0), (True, 0), (False, 1), (True, 2)])
def test_codes_and_scales_follow_the_formula(dtype: torch.dtype, kind: str, with_mod: bool, affine: int) -> None:
    x = draw(M, K, dtype=dtype) * 3 + 1
    mod = list(draw(B, 6 * K, dtype=dtype).chunk(6, dim=1))[2:4] if with_mod else []
    vectors = [draw(K), draw(K, dtype=dtype)][:affine]
    codes, scale = norm_quant(x, mod, vectors, [], kind, 1e-6, 0, "")
    want, want_scale = codes_of(truth(x, mod, vectors, kind, 1e-6))
    torch.testing.assert_close(scale.double(), want_scale, rtol=1e-5, atol=0)
    assert (codes - want).abs().max() < 0.5 + 1e-3


@pytest.mark.parametrize(("size", "kind"), [(64, "sylvester"), (16, "regular")])
def test_the_transform_is_scale_then_signs_then_rotation(size: int, kind: str) -> None:
    x, pre_scale = draw(M, K), torch.rand(K) + 0.5
    signs = (torch.randint(2, (K,)) * 2 - 1).to(torch.int8)
    h = torch.block_diag(*[hadamard_matrix(size, kind)] * (K // size)).double() / size**0.5
    for vectors in ([], [pre_scale], [signs], [pre_scale, signs]):
        y = truth(x, [], [], "rms", 1e-5)
        for vector in vectors:
            y = y * vector
        codes, scale = norm_quant(x, [], [], vectors, "rms", 1e-5, size, kind)
        want, want_scale = codes_of(y @ h)
        torch.testing.assert_close(scale.double(), want_scale, rtol=1e-5, atol=0)
        assert (codes - want).abs().max() < 0.5 + 1e-3


def test_fusing_is_more_accurate_than_a_bfloat16_chain(relative_rms) -> None:
    x = draw(M, K, dtype=torch.bfloat16) * 3
    shift, scale = draw(B, 2 * K, dtype=torch.bfloat16).chunk(2, dim=1)
    pre_scale, signs = torch.rand(K) + 0.5, torch.ones(K, dtype=torch.int8)
    h = torch.block_diag(*[hadamard_matrix(64, "sylvester")] * 3).double() / 8
    want = (truth(x, [shift, scale], [], "layer", 1e-6) * pre_scale) @ h
    tokens = M // B
    y = F.layer_norm(x, (K,), eps=1e-6) * (1 + scale.repeat_interleave(tokens, 0)) + shift.repeat_interleave(tokens, 0)
    chain = quant_token(hadamard(y * pre_scale.bfloat16(), signs, 64, "sylvester"))
    fused = norm_quant(x, [shift, scale], [], [pre_scale, signs], "layer", 1e-6, 64, "sylvester")
    errors = [relative_rms(codes.double() * scales.double()[:, None], want) for codes, scales in (fused, chain)]
    assert errors[0] <= errors[1]
    # and nearly all of it is the rounding to codes
    ideal, ideal_scale = codes_of(want)
    assert errors[0] <= 1.001 * relative_rms(ideal.round() * ideal_scale[:, None], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_residual_is_rounded_once_and_quantised_as_stored(dtype: torch.dtype) -> None:
    residual, branch, gate = draw(M, K, dtype=dtype), draw(M, 2 * K, dtype=dtype)[:, K:], draw(B, K)
    mod = list(draw(B, 2 * K).chunk(2, dim=1))
    h, *quantized = gate_norm_quant([residual, branch, gate], mod, [], [], *PLAIN)
    exact = residual.double() + gate.double().repeat_interleave(M // B, 0) * branch.double()
    torch.testing.assert_close(h.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    for got, want in zip(quantized, norm_quant(h, mod, [], [], *PLAIN), strict=True):
        assert torch.equal(got, want)
    plain, *_ = gate_norm_quant([residual, branch], mod, [], [], *PLAIN)
    assert torch.equal(plain, (residual.float() + branch.float()).to(dtype))


@pytest.mark.parametrize(("out", "group"), [("fp4", 0), ("fp4g32", 32)])
def test_fp4_is_quant_token_fp4_of_what_the_layer_reads(out: str, group: int) -> None:
    x, signs = draw(M, K), torch.ones(K, dtype=torch.int8)
    y = hadamard(F.layer_norm(x, (K,), eps=1e-6), signs, 64, "sylvester")
    got = NORM_QUANT[out](x, [], [], [signs], "layer", 1e-6, 64, "sylvester")
    for mine, want in zip(got, quant_token_fp4(y, group), strict=True):
        assert torch.equal(mine, want)


def test_fp8_codes_use_the_whole_range() -> None:
    x = draw(M, K)
    want, want_scale = codes_of(truth(x, [], [], "layer", 1e-6), 448.0)
    for codes, scale in (
        norm_quant_fp8(x, [], [], [], *PLAIN),
        gate_norm_quant_fp8([x, 0 * x], [], [], [], *PLAIN)[1:],
    ):
        assert codes.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(scale.double(), want_scale, rtol=1e-5, atol=0)
        assert torch.equal(codes.float().abs().amax(1), torch.full((M,), 448.0))
        # 3 bits of mantissa: half a step is 1/16 of the value, 2**-10 at the smallest
        assert ((codes.double() - want).abs() <= want.abs() / 16 * 1.001 + 2**-10).all()


def test_rows_that_are_constant_or_not_finite() -> None:
    x = draw(4, K)
    x[0], x[1, 3], x[2, 5] = 7.0, float("nan"), float("inf")
    codes, scale = norm_quant(x, [], [], [], *PLAIN)
    assert torch.isfinite(scale).tolist() == [True, False, False, True]
    assert codes[0].abs().max() == 0
    assert norm_quant(x[:0], [], [], [], *PLAIN)[0].shape == (0, K)


def test_errors_name_what_was_expected_and_found() -> None:
    x, row = draw(6, 64), draw(2, 64)
    signs = torch.ones(64, dtype=torch.int8)
    for bad, message in (
        ((x, [row], [], [], *PLAIN), r"mod to be \[\] or \[shift, scale\], found 1"),
        ((x, [row, row[:1]], [], [], *PLAIN), "scale like shift"),
        ((x, [draw(4, 64)] * 2, [], [], *PLAIN), "number of rows that divides M=6"),
        ((x, [], [row], [], *PLAIN), r"float affine of shape \(64,\)"),
        ((x, [], [], [signs, row[0]], *PLAIN), r"\[pre_scale, signs\]"),
        ((x, [], [], [signs], *PLAIN), "a block_size with signs"),
        ((x, [], [], [], "group", 1e-6, 0, ""), "kind to be one of layer, rms, found 'group'"),
        ((x, [], [], [], "layer", 1e-6, 48, "sylvester"), "power of two"),
        ((x.int(), [], [], [], *PLAIN), "x float32, bfloat16 or float16"),
    ):
        with pytest.raises(ValueError, match=f"norm_quant: expected .*{message}|hadamard: expected .*{message}"):
            norm_quant(*bad)
    with pytest.raises(ValueError, match=r"gate_norm_quant: expected a float branch of shape \(6, 64\)"):
        gate_norm_quant([x, row], [], [], [], *PLAIN)
    with pytest.raises(ValueError, match=r"gate_norm_quant: expected stream"):
        gate_norm_quant([x], [], [], [], *PLAIN)
