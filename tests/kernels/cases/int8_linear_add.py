from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import int8_linear_add as module
from vdit_quant.kernels.int8_linear_add import int8_linear_add

from ._case import EVERYWHERE, FLOATS, HOPPER, INT8, LAYERS, LINEAR, Compile, run_twin, twin

OPS = {"int8_linear_add": int8_linear_add}


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {
        "int8_linear_add": [
            (a.codes, a.scale, a.weight, a.weight_scale, a.bias, a.x[:, :8], a.x[:1, 8:16]),
            (a.codes, a.scale, a.weight, a.weight_scale, None, a.x[:, :8].bfloat16(), None),
        ]
    }


def compile_cases() -> Iterator[Compile]:
    file = twin("int8_linear_add")
    types = {**LINEAR, "x_ptr": "*i8", "y_ptr": "*bf16", "residual_ptr": "*bf16", "gate_ptr": "*bf16"}
    types |= {"TOKENS": "i32", "GATE_STRIDE": "i32"}
    for m, gate, tokens in ((512, True, 256), (8192, True, 256), (8192, True, 64), (8192, False, 8192)):
        options, one = file.launch_options(m, 1152, tokens)
        constants = {"HAS_BIAS": True, "HAS_GATE": gate, "ONE_SAMPLE": one, "EVEN_K": True}
        constants |= {**options, **file.ROUND_EACH_STEP}
        on, units = (EVERYWHERE if gate else HOPPER, INT8) if m == 8192 else (HOPPER, {})
        name = f"M={m} tokens={tokens} gate={gate}"
        yield Compile(name, file.int8_linear_add_kernel, types, constants, on, units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("m", "k", "n", "samples"), [(1, 72, 33, 1), (34, 200, 40, 2), (130, 33, 130, 5), (128, 64, 40, 2)]
)
def interpreter_equals_reference(m: int, k: int, n: int, samples: int, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(m, k, n)
    residual = make_layer(m, n, 1).x.to(dtype)
    gate = make_layer(samples, 6 * n, 1).x.to(dtype)[:, 2 * n : 3 * n]
    for chosen, bias in ((gate, a.bias), (gate.t().contiguous().t(), None), (None, a.bias)):
        args = (a.codes, a.scale, a.weight, a.weight_scale, bias, residual, chosen)
        assert torch.equal(run_twin("int8_linear_add", *args), int8_linear_add(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "n"), LAYERS)
@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (2, 256), (3, 43), (32, 256), (2, 4096)])
def cuda_equals_reference(samples: int, tokens: int, k: int, n: int, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(samples * tokens, k, n, device="cuda")
    residual = torch.randn(samples * tokens, n, device="cuda").to(dtype)
    gate = torch.randn(samples, 6 * n, device="cuda").to(dtype)[:, 2 * n : 3 * n]
    for chosen, bias in ((gate, a.bias), (None, None)):
        args = (a.codes, a.scale, a.weight, a.weight_scale, bias, residual, chosen)
        assert torch.equal(int8_linear_add(*args), module._reference(*args))
