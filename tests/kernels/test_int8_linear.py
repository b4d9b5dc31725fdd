import pytest
import torch

from vdit_quant.kernels import int8_linear as module
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear, int_matmul

SHAPES = [(1, 72, 33), (17, 200, 40), (129, 2240, 24), (3, 1025, 7)]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("portable", [False, True])
def test_the_sum_is_exact(m: int, k: int, n: int, portable: bool, make_layer, monkeypatch) -> None:
    if portable:
        monkeypatch.setattr(module, "_cpu_int_mm_is_exact", lambda: False)
    layer = make_layer(m, k, n)
    codes, weight = layer.codes.clone(), layer.weight.clone()
    codes[0], weight[0] = 127, -128
    assert torch.equal(int_matmul(codes, weight).long(), codes.long() @ weight.long().t())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_float64(out_dtype: torch.dtype, with_bias: bool, make_layer, relative_rms) -> None:
    layer = make_layer(17, 200, 40)
    bias = layer.bias if with_bias else None
    y = int8_linear(layer.codes, layer.scale, layer.weight, layer.weight_scale, bias, out_dtype)
    want = (
        layer.codes.double() @ layer.weight.double().t() * layer.scale.double()[:, None] * layer.weight_scale.double()
    )
    want = want if bias is None else want + bias.double()
    assert y.dtype == out_dtype
    assert relative_rms(y, want) < torch.finfo(out_dtype).eps


@pytest.mark.parametrize("batch", [2, 17, 129])
@pytest.mark.parametrize("k", [72, 2240])
def test_a_row_does_not_depend_on_its_batch(batch: int, k: int, make_layer) -> None:
    layer = make_layer(129, k, 40)
    rest = (layer.weight, layer.weight_scale, layer.bias, torch.float32)
    whole = int8_linear(layer.codes[:batch], layer.scale[:batch], *rest)
    for row in (0, batch - 1):
        assert torch.equal(
            whole[row : row + 1], int8_linear(layer.codes[row : row + 1], layer.scale[row : row + 1], *rest)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only_matches_float64(dtype: torch.dtype, make_layer, relative_rms) -> None:
    layer = make_layer(17, 200, 40, dtype=dtype)
    y = int8_weight_linear(layer.x, layer.weight, layer.weight_scale, layer.bias)
    want = layer.x.double() @ layer.weight.double().t() * layer.weight_scale.double() + layer.bias.double()
    assert y.dtype == dtype
    assert relative_rms(y, want) < 2 * torch.finfo(dtype).eps


def test_weight_only_fp16_survives_large_products() -> None:
    x = torch.full((1, 512), 8.0, dtype=torch.float16)
    weight = torch.full((1, 512), 127, dtype=torch.int8)
    y = int8_weight_linear(x, weight, torch.tensor([1e-3]), None)
    torch.testing.assert_close(y.float(), torch.tensor([[8.0 * 512 * 0.127]]), rtol=1e-3, atol=0)


def test_empty_batch(make_layer) -> None:
    layer = make_layer(3, 16, 5)
    y = int8_linear(layer.codes[:0], layer.scale[:0], layer.weight, layer.weight_scale, None, torch.float32)
    assert y.shape == (0, 5)


def test_errors_name_the_op_what_was_expected_and_found(make_layer) -> None:
    a = make_layer(3, 16, 5)
    with pytest.raises(
        ValueError, match=r"int8_linear: expected weight torch.int8 \[N, 16\], found torch.int8 of shape \(5, 8\)"
    ):
        int8_linear(a.codes, a.scale, a.weight[:, :8], a.weight_scale, None, torch.float32)
    with pytest.raises(ValueError, match=r"int8_linear: expected scale"):
        int8_linear(a.codes, a.scale[:2], a.weight, a.weight_scale, None, torch.float32)
    with pytest.raises(ValueError, match=r"int8_linear: expected codes torch.int8"):
        int8_linear(a.x, a.scale, a.weight, a.weight_scale, None, torch.float32)
    with pytest.raises(ValueError, match=r"int8_linear: expected out_dtype"):
        int8_linear(a.codes, a.scale, a.weight, a.weight_scale, None, torch.int8)
    with pytest.raises(ValueError, match=r"int8_weight_linear: expected a float bias"):
        int8_weight_linear(a.x, a.weight, a.weight_scale, a.bias[:2])
    with pytest.raises(ValueError, match=r"int8_weight_linear: expected weight_scale"):
        int8_weight_linear(a.x, a.weight, a.weight_scale.double(), None)
