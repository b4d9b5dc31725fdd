from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels.int8_linear import int8_linear
from vdit_quant.kernels.int8_linear_add import int8_linear_add

Operands = Callable[..., tuple[Tensor | None, ...]]


@pytest.fixture
def operands(make_layer) -> Operands:
    """Arguments of the op for `samples` of `tokens` rows; the gate is a chunk of a wider matrix."""

    def make(samples: int, tokens: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        a = make_layer(samples * tokens, k, n)
        residual = make_layer(samples * tokens, n, 1).x.to(dtype)
        gate = make_layer(samples, 6 * n, 1).x.to(dtype).chunk(6, dim=1)[4]
        return a.codes, a.scale, a.weight, a.weight_scale, a.bias, residual, gate

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (1, 17), (3, 5), (4, 1)])
def test_matches_float64(samples: int, tokens: int, dtype: torch.dtype, operands, relative_rms) -> None:
    codes, scale, weight, weight_scale, bias, residual, gate = operands(samples, tokens, 72, 24, dtype)
    y = int8_linear_add(codes, scale, weight, weight_scale, bias, residual, gate)
    want = codes.double() @ weight.double().t() * scale.double()[:, None] * weight_scale.double() + bias.double()
    want = residual.double() + gate.double().repeat_interleave(tokens, 0) * want
    assert y.dtype == dtype
    assert relative_rms(y, want) < torch.finfo(dtype).eps


def test_is_rounded_once(operands, relative_rms) -> None:
    codes, scale, weight, weight_scale, bias, residual, gate = operands(2, 64, 200, 40, torch.bfloat16)
    once = int8_linear_add(codes, scale, weight, weight_scale, bias, residual, gate)
    branch = int8_linear(codes, scale, weight, weight_scale, bias, torch.bfloat16)
    twice = residual + gate.repeat_interleave(64, 0) * branch
    exact = int8_linear_add(codes, scale, weight, weight_scale, bias, residual.float(), gate.float())
    assert torch.equal(once, exact.bfloat16())
    assert relative_rms(once, exact) < relative_rms(twice, exact)


def test_without_gate_and_bias_it_adds(operands) -> None:
    codes, scale, weight, weight_scale, _, residual, _ = operands(2, 3, 72, 24)
    plain = int8_linear(codes, scale, weight, weight_scale, None, torch.float32)
    assert torch.equal(int8_linear_add(codes, scale, weight, weight_scale, None, residual, None), plain + residual)


def test_leaves_its_inputs_alone(operands) -> None:
    args = operands(2, 3, 72, 24)
    before = [t.clone() for t in args]
    int8_linear_add(*args)
    assert all(torch.equal(t, old) for t, old in zip(args, before, strict=True))


def test_a_sample_does_not_depend_on_its_batch(operands) -> None:
    codes, scale, weight, weight_scale, bias, residual, gate = operands(4, 7, 72, 24)
    together = int8_linear_add(codes, scale, weight, weight_scale, bias, residual, gate)
    for i in range(4):
        rows = slice(7 * i, 7 * i + 7)
        alone = int8_linear_add(codes[rows], scale[rows], weight, weight_scale, bias, residual[rows], gate[i : i + 1])
        assert torch.equal(alone, together[rows])


def test_empty_batch(operands) -> None:
    codes, scale, weight, weight_scale, bias, residual, gate = operands(2, 3, 16, 5)
    y = int8_linear_add(codes[:0], scale[:0], weight, weight_scale, bias, residual[:0], gate)
    assert y.shape == (0, 5)


def test_errors_name_the_op_what_was_expected_and_found(operands) -> None:
    codes, scale, weight, weight_scale, bias, residual, gate = operands(2, 3, 16, 5)
    first = (codes, scale, weight, weight_scale, bias)
    with pytest.raises(ValueError, match=r"int8_linear_add: expected a float residual of shape \(6, 5\), found"):
        int8_linear_add(*first, residual[:, :4], gate)
    with pytest.raises(ValueError, match=r"int8_linear_add: expected a float residual \[M, N\], found torch.int64"):
        int8_linear_add(*first, residual.long(), gate)
    with pytest.raises(ValueError, match=r"int8_linear_add: expected a float gate \[B, 5\]"):
        int8_linear_add(*first, residual, gate[:, :4])
    with pytest.raises(ValueError, match=r"a gate whose rows cut 6 tokens into equal samples, found 4 rows"):
        int8_linear_add(*first, residual, torch.ones(4, 5))
