import pytest
import torch

from vdit_quant.kernels.quant_token import quant_token


def test_ties_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    codes, scale = quant_token(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_and_one_hot_rows(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 9, dtype=dtype)
    x[1, 4] = -3.0
    codes, scale = quant_token(x)
    assert codes[[0, 2]].abs().sum() == 0
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert codes[1].tolist() == [0, 0, 0, 0, -127, 0, 0, 0, 0]
    torch.testing.assert_close(scale[1], torch.tensor(3.0 / 127))


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_error_is_at_most_half_a_step(magnitude: float) -> None:
    x = (torch.rand(64, 33, generator=torch.Generator().manual_seed(0)) * 2 - 1) * magnitude
    codes, scale = quant_token(x)
    assert codes.abs().max() <= 127
    error = (codes.double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_says_so_in_its_scale(bad: float) -> None:
    x = torch.ones(2, 8)
    x[0, 3] = bad
    _, scale = quant_token(x)
    assert torch.isfinite(scale).tolist() == [False, True]


def test_empty_batch() -> None:
    codes, scale = quant_token(torch.zeros(0, 4))
    assert codes.shape == (0, 4)
    assert scale.shape == (0,)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, 0)])
def test_refuses_other_shapes_and_dtypes(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"quant_token: expected"):
        quant_token(bad)
