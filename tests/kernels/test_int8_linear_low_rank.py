import pytest
import torch

from vdit_quant.kernels.int8_linear import int8_linear
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "rank"), [(1, 1), (17, 16), (33, 40)])
def test_matches_float64(m: int, rank: int, dtype: torch.dtype, make_layer, relative_rms) -> None:
    a = make_layer(m, 72, 24)
    low, up = make_layer(m, rank, 1).x.to(dtype), make_layer(24, rank, 2).x.to(dtype)
    y = int8_linear_low_rank(a.codes, a.scale, a.weight, a.weight_scale, a.bias, low, up, dtype)
    want = a.codes.double() @ a.weight.double().t() * a.scale.double()[:, None] * a.weight_scale.double()
    want = want + low.double() @ up.double().t() + a.bias.double()
    assert y.dtype == dtype
    assert relative_rms(y, want) < 2 * torch.finfo(dtype).eps


def test_a_zero_branch_changes_nothing(make_layer) -> None:
    a = make_layer(17, 72, 24)
    first = (a.codes, a.scale, a.weight, a.weight_scale, a.bias)
    y = int8_linear_low_rank(*first, torch.zeros(17, 4), torch.ones(24, 4), torch.float32)
    assert torch.equal(y, int8_linear(*first, torch.float32))


def test_empty_batch(make_layer) -> None:
    a = make_layer(3, 16, 5)
    first = (a.codes[:0], a.scale[:0], a.weight, a.weight_scale, None)
    assert int8_linear_low_rank(*first, torch.zeros(0, 4), torch.zeros(5, 4), torch.bfloat16).shape == (0, 5)


def test_errors_name_the_op_what_was_expected_and_found(make_layer) -> None:
    a = make_layer(3, 16, 5)
    first = (a.codes, a.scale, a.weight, a.weight_scale, None)
    with pytest.raises(ValueError, match=r"int8_linear_low_rank: expected a float low \[3, R\], found torch.float32"):
        int8_linear_low_rank(*first, torch.zeros(2, 4), torch.zeros(5, 4), torch.float32)
    with pytest.raises(ValueError, match=r"int8_linear_low_rank: expected up torch.float32 of shape \(5, 4\), found"):
        int8_linear_low_rank(*first, torch.zeros(3, 4), torch.zeros(5, 3), torch.float32)
    with pytest.raises(ValueError, match=r"expected up torch.bfloat16 of shape \(5, 4\), found torch.float32"):
        int8_linear_low_rank(*first, torch.zeros(3, 4).bfloat16(), torch.zeros(5, 4), torch.float32)
