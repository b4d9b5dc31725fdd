import pytest
import torch

from vdit_quant.kernels.int8_linear import int8_linear
from vdit_quant.kernels.int8_linear_add import int8_linear_add
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "rank"), [(1, 1), (17, 16), (33, 40)])
def test_matches_float64(m: int, rank: int, dtype: torch.dtype, make_layer, relative_rms) -> None:
    a = make_layer(m, 72, 24)
    low, up = make_layer(m, rank, 1).x.to(dtype), make_layer(24, rank, 2).x.to(dtype)
    first = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, [low, up])
    y = int8_linear_low_rank(*first, [], dtype)
    want = a.codes.double() @ a.weight.double().t() * a.scale.double()[:, None] * a.weight_scale.double()
    want = want + low.double() @ up.double().t() + a.bias.double()
    assert y.dtype == dtype
    assert relative_rms(y, want) < 2 * torch.finfo(dtype).eps
    residual, gate = make_layer(m, 24, 3).x.to(dtype), make_layer(1, 24, 4).x
    y = int8_linear_low_rank(*first, [residual, gate], dtype)
    assert relative_rms(y, residual.double() + gate.double() * want) < 2 * torch.finfo(dtype).eps


def test_joined_layers_have_their_own_columns(make_layer) -> None:
    a = make_layer(17, 72, 24)
    low, up = make_layer(17, 12, 1).x, make_layer(24, 4, 2).x
    owner = torch.tensor([0] * 8 + [1] * 3 + [2] * 13, dtype=torch.uint8)
    y = int8_linear_low_rank(a.codes, a.scale, a.weight, a.weight_scale, None, [low, up, owner], [], torch.float32)
    for layer in range(3):
        rows = owner == layer
        branch = [low[:, 4 * layer : 4 * layer + 4], up[rows]]
        alone = int8_linear_low_rank(
            a.codes, a.scale, a.weight[rows], a.weight_scale[rows], None, branch, [], torch.float32
        )
        torch.testing.assert_close(y[:, rows], alone)


def test_a_zero_branch_changes_nothing(make_layer) -> None:
    a = make_layer(16, 72, 24)
    first = (a.codes, a.scale, a.weight, a.weight_scale, a.bias)
    branch = [torch.zeros(16, 4), torch.ones(24, 4)]
    assert torch.equal(int8_linear_low_rank(*first, branch, [], torch.float32), int8_linear(*first, torch.float32))
    residual, gate = make_layer(16, 24, 1).x, make_layer(4, 24, 2).x
    for stream in ([residual], [residual, gate]):
        y = int8_linear_low_rank(*first, branch, stream, torch.float32)
        assert torch.equal(y, int8_linear_add(*first, *[*stream, None][:2]))


def test_empty_batch(make_layer) -> None:
    a = make_layer(3, 16, 5)
    first = (a.codes[:0], a.scale[:0], a.weight, a.weight_scale, None)
    y = int8_linear_low_rank(*first, [torch.zeros(0, 4), torch.zeros(5, 4)], [], torch.bfloat16)
    assert y.shape == (0, 5)


@pytest.mark.parametrize(
    ("branch", "stream", "message"),
    [
        ([(3, 4)], [], r"branch to be \[low, up\] or \[low, up, owner\], found 1 tensors"),
        ([(2, 4), (5, 4)], [], r"a float low \[3, R\], found torch.float32 of shape \(2, 4\)"),
        ([(3, 4), (6, 4)], [], r"a float up \[5, R\], found torch.float32 of shape \(6, 4\)"),
        ([(3, 8), (5, 4)], [], r"a low of 4 columns, found torch.float32 of shape \(3, 8\)"),
        ([(3, 6), (5, 4), (5,)], [], r"a low of 4 columns a layer, found torch.float32 of shape \(3, 6\)"),
        ([(3, 8), (5, 4), (5,)], [], r"an owner torch.uint8 of a length that divides 5, found torch.float32 of shape"),
        ([(3, 4), (5, 4)], [(3, 4)], r"a residual torch.float32 of shape \(3, 5\), found"),
        ([(3, 4), (5, 4)], [(3, 5), (2, 5)], "gate with a number of rows that divides M=3"),
        ([(3, 4), (5, 4)], [(3, 5)] * 3, "stream to be"),
    ],
)
def test_errors_name_the_op_what_was_expected_and_found(branch, stream, message: str, make_layer) -> None:
    a = make_layer(3, 16, 5)
    lists = [[torch.zeros(shape) for shape in shapes] for shapes in (branch, stream)]
    with pytest.raises(ValueError, match=f"int8_linear_low_rank: expected {message}"):
        int8_linear_low_rank(a.codes, a.scale, a.weight, a.weight_scale, None, *lists, torch.float32)
