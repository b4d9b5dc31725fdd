from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import gate_add as module
from vdit_quant.kernels.gate_add import gate_add

from ._case import EVERYWHERE, FLOATS, HOPPER, Compile, run_twin, twin

OPS = {"gate_add": gate_add}


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {"gate_add": [(a.x, a.x.bfloat16(), a.x[:1]), (a.x.half()[:, :8], a.x[:, 8:16], None)]}


def compile_cases() -> Iterator[Compile]:
    file = twin("gate_add")
    types = dict.fromkeys(("residual_ptr", "branch_ptr", "gate_ptr", "y_ptr"), "*bf16")
    types |= dict.fromkeys(("residual_stride", "branch_stride", "gate_stride", "M", "N", "TOKENS"), "i32")
    for m, gate, tokens in ((8192, True, 256), (8192, True, 77), (8192, False, 8192)):
        constants = {"HAS_GATE": gate, "ONE_SAMPLE": file.is_one_sample(m, tokens), **file.TILE, **file.ROUND_EACH_STEP}
        on = EVERYWHERE if tokens == 256 else HOPPER
        yield Compile(f"tokens={tokens} gate={gate}", file.gate_add_kernel, types, constants, on)


def _operands(samples: int, tokens: int, n: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    residual, branch = (torch.randn(samples * tokens, n + 16, device=device).to(dtype) for _ in range(2))
    gate = torch.randn(samples, 6 * n, device=device).to(dtype)
    return residual[:, :n], branch[:, 16:], gate[:, 2 * n : 3 * n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("samples", "tokens", "n"), [(1, 1, 33), (2, 17, 128), (5, 3, 200), (2, 16, 40)])
def interpreter_equals_reference(samples: int, tokens: int, n: int, dtype: torch.dtype) -> None:
    residual, branch, gate = _operands(samples, tokens, n, dtype)
    for args in ((residual, branch, gate), (residual, branch.float(), None), (residual, branch, gate.t().clone().t())):
        assert torch.equal(run_twin("gate_add", *args), gate_add(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [40, 130, 1152, 3072])
@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (2, 256), (3, 43), (32, 256), (1, 4429)])
def cuda_equals_reference(samples: int, tokens: int, n: int, dtype: torch.dtype) -> None:
    residual, branch, gate = _operands(samples, tokens, n, dtype, "cuda")
    for args in ((residual, branch, gate), (residual, branch.contiguous(), gate.float()), (residual, branch, None)):
        assert torch.equal(gate_add(*args), module._reference(*args))
