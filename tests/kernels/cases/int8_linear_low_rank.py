from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import int8_linear_low_rank as module
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank

from ._case import (
    DIT_XL,
    FLOATS,
    LINEAR,
    POINTERS,
    RAGGED,
    TOKENS,
    Compile,
    assert_as_good_as,
    relative_rms,
    run_twin,
    twin,
)

OPS = {"int8_linear_low_rank": int8_linear_low_rank}


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    low, up = a.x[:, :4], a.x[0].view(8, 8)[:, :4]
    return {
        "int8_linear_low_rank": [
            (a.codes, a.scale, a.weight, a.weight_scale, a.bias, low, up, torch.bfloat16),
            (a.codes, a.scale, a.weight, a.weight_scale, None, low, up, torch.float32),
        ]
    }


def compile_cases() -> Iterator[Compile]:
    file = twin("int8_linear_low_rank")
    bf16, fp32 = torch.bfloat16, torch.float32
    for m, rank, dtype in ((17, 32, bf16), (512, 16, bf16), (8192, 32, bf16), (8192, 32, fp32)):
        types = {**LINEAR, "x_ptr": "*i8", "y_ptr": "*bf16", "R": "i32"}
        types |= dict.fromkeys(("low_ptr", "up_ptr"), POINTERS[dtype])
        constants = {"HAS_BIAS": True, "EVEN_K": True, "DOT": file.dot_dtype(dtype)}
        constants |= {**file.launch_options(m, 4608, rank, dtype), **file.ROUND_EACH_STEP}
        yield Compile(f"M={m} R={rank} {dtype}", file.int8_linear_low_rank_kernel, types, constants)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "n", "rank"), [(1, 72, 33, 16), (17, 200, 40, 5), (129, 33, 130, 40)])
def interpreter_equals_reference(m: int, k: int, n: int, rank: int, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(m, k, n)
    low, up = make_layer(m, rank, 1).x.to(dtype), make_layer(n, rank, 2).x.to(dtype)
    for bias in (a.bias, None):
        args = (a.codes, a.scale, a.weight, a.weight_scale, bias, low, up, torch.float32)
        assert relative_rms(run_twin("int8_linear_low_rank", *args), int8_linear_low_rank(*args)) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank", [16, 32, 128])
@pytest.mark.parametrize(("k", "n"), DIT_XL[:1] + RAGGED)
def cuda_equals_reference(k: int, n: int, rank: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, device="cuda")
        low, up = torch.randn(m, rank, device="cuda").to(dtype), torch.randn(n, rank, device="cuda").to(dtype)
        args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, low, up, torch.float32)
        want = a.codes.double() @ a.weight.double().t() * a.scale.double()[:, None] * a.weight_scale.double()
        want += low.double() @ up.double().t() + a.bias
        assert_as_good_as(module._reference(*args), int8_linear_low_rank(*args), want)
