import pytest
import torch
from torch import Tensor

from vdit_quant.kernels.gate_add import gate_add


@pytest.fixture
def operands(make_layer):
    """Residual, branch and gate for `samples` of `tokens` rows; the gate is a chunk of a wider matrix."""

    def make(samples: int, tokens: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        residual, branch = make_layer(samples * tokens, 2 * n, 1).x.to(dtype).chunk(2, dim=1)
        return residual, branch, make_layer(samples, 6 * n, 1).x.to(dtype).chunk(6, dim=1)[4]

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (1, 17), (3, 5), (4, 1)])
def test_is_rounded_once(samples: int, tokens: int, dtype: torch.dtype, operands) -> None:
    residual, branch, gate = operands(samples, tokens, 24, dtype)
    exact = residual.double() + gate.double().repeat_interleave(tokens, 0) * branch.double()
    found = gate_add(residual, branch, gate)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    if dtype != torch.float32:
        assert (found == exact.float().to(dtype)).float().mean() > 0.99
    assert torch.equal(gate_add(residual, branch, None), (residual.float() + branch.float()).to(dtype))


def test_has_the_dtype_of_the_residual(operands) -> None:
    residual, branch, gate = operands(2, 3, 24)
    found = gate_add(residual.bfloat16(), branch, gate)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, gate_add(residual.bfloat16().float(), branch, gate).bfloat16())


def test_a_sample_does_not_depend_on_its_batch_and_inputs_are_left_alone(operands) -> None:
    args = operands(4, 7, 24)
    before = [t.clone() for t in args]
    together = gate_add(*args)
    assert all(torch.equal(t, old) for t, old in zip(args, before, strict=True))
    residual, branch, gate = args
    for i in range(4):
        rows = slice(7 * i, 7 * i + 7)
        assert torch.equal(gate_add(residual[rows], branch[rows], gate[i : i + 1]), together[rows])


def test_empty_batch(operands) -> None:
    residual, branch, gate = operands(2, 3, 5)
    assert gate_add(residual[:0], branch[:0], gate).shape == (0, 5)


def test_errors_name_the_op_what_was_expected_and_found(operands) -> None:
    residual, branch, gate = operands(2, 3, 5)
    with pytest.raises(ValueError, match=r"gate_add: expected a float branch of shape \(6, 5\), found"):
        gate_add(residual, branch[:, :4], gate)
    with pytest.raises(ValueError, match=r"gate_add: expected x float32, bfloat16 or float16"):
        gate_add(residual.long(), branch, gate)
    with pytest.raises(ValueError, match=r"gate_add: expected gate with a number of rows that divides M=6, found"):
        gate_add(residual, branch, torch.ones(4, 5))
