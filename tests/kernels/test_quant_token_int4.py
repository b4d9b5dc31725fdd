import pytest
import torch

from vdit_quant.kernels.quant_token_int4 import quant_token_int4

GROUPS = (0, 16, 32, 64, 128)
grouped = pytest.mark.parametrize("group", GROUPS)


def test_ties_go_to_even_and_both_ends_are_reached() -> None:
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -8.0, 6.5, -7.5]])
    assert quant_token_int4(x, 0)[0].tolist() == [[7, 0, 2, 2, 0, -2, -2, -8, 6, -8]]


def test_of_codes_with_rounded_levels_the_nearest_is_taken_and_the_rounded_one_of_equals() -> None:
    """Ends -127.5, -8, -10, -0.5: the row's step is 1, those of its groups 255/16, 16/16, 20/16 and 1/16."""
    x = torch.zeros(1, 64)
    x[0, 0] = -127.5
    x[0, 16:21] = torch.tensor([-8, 0.5, 1.5, -0.5, 2.5])
    x[0, 32:35] = torch.tensor([-10, 1.9, 2.2])  # 1.9 / 1.25 rounds to 2, which stands for 3; 1 stands for 1
    x[0, 48] = -0.5  # no code of this group stands for more than 0
    codes = quant_token_int4(x, 16)[0][0]
    assert codes[0] == -127
    assert codes[16:21].tolist() == [-8, 0, 2, 0, 2]
    assert codes[32:35].tolist() == [-10, 1, 3]
    assert codes[48] == 0


@grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_and_zero_groups(group: int, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 256, dtype=dtype)
    x[1, 4] = -3.0
    codes, scale = quant_token_int4(x, group)
    assert codes[[0, 2]].abs().sum() == 0
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert codes[1].nonzero().tolist() == [[4]]
    torch.testing.assert_close(codes[1, 4] * scale[1], torch.tensor(-3.0))


@grouped
@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_the_projection_on_a_token_is_the_token(group: int, magnitude: float) -> None:
    x = (torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1) * magnitude
    codes, scale = quant_token_int4(x, group)
    assert codes.abs().max() <= 127
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    wide = x.double() / magnitude
    along = (wide * codes.double() * (scale.double() / magnitude)[:, None]).sum(1)
    torch.testing.assert_close(along, wide.square().sum(1), rtol=1e-6, atol=0)


@grouped
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_row_that_is_not_finite_says_so_in_its_scale(group: int, bad: float) -> None:
    x = torch.ones(2, 128)
    x[0, 3] = bad
    _, scale = quant_token_int4(x, group)
    assert torch.isfinite(scale).tolist() == [False, True]


@grouped
def test_empty_batch(group: int) -> None:
    codes, scale = quant_token_int4(torch.zeros(0, 128), group)
    assert codes.shape == (0, 128)
    assert scale.shape == (0,)


@pytest.mark.parametrize(
    ("bad", "group"),
    [
        (torch.zeros(3), 0),
        (torch.zeros(2, 2, dtype=torch.int8), 0),
        (torch.zeros(2, 0), 0),
        (torch.zeros(2, 48), 48),
        (torch.zeros(2, 48), 32),
    ],
)
def test_refuses_other_shapes_dtypes_and_groups(bad: torch.Tensor, group: int) -> None:
    with pytest.raises(ValueError, match=r"quant_token_int4: expected"):
        quant_token_int4(bad, group)
