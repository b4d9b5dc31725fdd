import pytest
import torch

from vdit_quant.kernels.fp8_linear import E4M3, fp8_linear, quant_token_fp8

EPS = torch.finfo(E4M3).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_and_one_hot_rows(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 9, dtype=dtype)
    x[1, 4] = -3.0
    codes, scale = quant_token_fp8(x)
    assert codes.dtype == E4M3
    assert not codes[[0, 2]].float().any()
    assert torch.isfinite(scale).all()
    assert codes[1].float().tolist() == [0, 0, 0, 0, -448, 0, 0, 0, 0]
    torch.testing.assert_close(scale[1], torch.tensor(3.0 / 448))


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20, 3e38])
def test_the_error_is_relative(magnitude: float) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).clamp(-4, 4) / 4 * magnitude
    codes, scale = quant_token_fp8(x)
    decoded = codes.double() * scale.double()[:, None]
    smallest = 2.0**-10 * scale.double()[:, None]  # half a step of the subnormals
    assert ((decoded - x.double()).abs() <= (x.double().abs() * EPS / 2 * (1 + 1e-5)).maximum(smallest)).all()


def test_ties_go_to_even() -> None:
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10]])
    codes, scale = quant_token_fp8(x)
    assert scale.item() == 1
    assert codes.float().tolist() == [[448, 16, 20, -16, 0, 2.0**-8]]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_says_so_in_its_scale(bad: float) -> None:
    x = torch.ones(2, 8)
    x[0, 3] = bad
    assert torch.isfinite(quant_token_fp8(x)[1]).tolist() == [False, True]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_float64(out_dtype: torch.dtype, with_bias: bool, make_layer, relative_rms) -> None:
    a = make_layer(17, 200, 40)
    codes, scale = quant_token_fp8(a.x)
    weight, weight_scale = quant_token_fp8(a.weight.float())
    y = fp8_linear(codes, scale, weight, weight_scale, a.bias if with_bias else None, out_dtype)
    want = (codes.double() * scale.double()[:, None]) @ (weight.double() * weight_scale.double()[:, None]).t()
    want = want + a.bias.double() if with_bias else want
    assert y.dtype == out_dtype
    assert relative_rms(y, want) < 4 * torch.finfo(out_dtype).eps


def test_leaves_its_inputs_alone(make_layer) -> None:
    a = make_layer(3, 32, 16)
    args = (a.x.to(E4M3), a.scale, a.weight.to(E4M3), a.weight_scale, a.bias)
    before = [t.clone() for t in args]
    fp8_linear(*args, torch.float32)
    assert all(torch.equal(t.float(), old.float()) for t, old in zip(args, before, strict=True))


def test_empty_batch(make_layer) -> None:
    codes, scale = quant_token_fp8(torch.zeros(0, 16))
    a = make_layer(3, 16, 5)
    assert fp8_linear(codes, scale, a.weight.to(E4M3), a.weight_scale, None, torch.float32).shape == (0, 5)


def test_errors_name_the_op_what_was_expected_and_found(make_layer) -> None:
    a = make_layer(3, 16, 5)
    codes, weight = a.x.to(E4M3), a.weight.to(E4M3)
    with pytest.raises(ValueError, match=r"quant_token_fp8: expected x float32, bfloat16 or float16"):
        quant_token_fp8(a.codes)
    with pytest.raises(ValueError, match=r"fp8_linear: expected codes torch.float8_e4m3fn \[M, K\], found torch.int8"):
        fp8_linear(a.codes, a.scale, weight, a.weight_scale, None, torch.float32)
    with pytest.raises(
        ValueError, match=r"fp8_linear: expected weight torch.float8_e4m3fn \[N, 16\], found torch.int8"
    ):
        fp8_linear(codes, a.scale, a.weight, a.weight_scale, None, torch.float32)
    with pytest.raises(ValueError, match=r"fp8_linear: expected scale torch.float32 of shape \(3,\)"):
        fp8_linear(codes, a.scale[:2], weight, a.weight_scale, None, torch.float32)
