from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import quant_token as module
from vdit_quant.kernels.quant_token import quant_token

from ._case import EVERYWHERE, FLOATS, HOPPER, ROWS, SIZES, TOKENS, Compile, run_twin, twin

OPS = {"quant_token": quant_token}
LIMITS = [
    ("quant_token", {"dtype": torch.float64}, "dtype torch.float64 is not supported"),
    ("quant_token", {"k": 65536}, "K=65536 is larger than 32768"),
]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {"quant_token": [(a.x,), (a.x.bfloat16(),)]}


def compile_cases() -> Iterator[Compile]:
    file = twin("quant_token")
    for k in (1152, 3072, 15360):
        types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", **SIZES}
        constants = {"TINY": 1e-30, **file.launch_options(k), **file.ROUND_EACH_STEP}
        yield Compile(f"K={k}", file.quant_token_kernel, types, constants, on=EVERYWHERE if k == 1152 else HOPPER)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (17, 72), (129, 200)])
def interpreter_equals_reference(m: int, k: int, dtype: torch.dtype, make_layer) -> None:
    x = make_layer(m, k, 4).x.to(dtype)
    x[-1] = 0
    x[m // 2, k // 2] = 100
    for got, want in zip(run_twin("quant_token", x), quant_token(x), strict=True):
        assert torch.equal(got, want)


def interpreter_ties_and_rows_that_are_not_finite() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]]).repeat(3, 1)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    codes, scale = run_twin("quant_token", x)
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    assert torch.isfinite(scale).tolist() == [True, False, False]


def interpreter_views_and_empty_batches(make_layer) -> None:
    x = make_layer(17, 144, 40).x[:, ::2]
    for got, want in zip(run_twin("quant_token", x), quant_token(x), strict=True):
        assert torch.equal(got, want)
    assert run_twin("quant_token", x[:0])[0].shape == (0, 72)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", ROWS)
def cuda_equals_reference(k: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        x = make_layer(m, k, 1, dtype=dtype, device="cuda").x
        x[-1] = 0
        for got, want in zip(quant_token(x), module._reference(x), strict=True):
            assert torch.equal(got, want)


def cuda_rows_that_are_not_finite() -> None:
    x = torch.ones(3, 1152, device="cuda", dtype=torch.bfloat16)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    assert torch.isfinite(quant_token(x)[1]).tolist() == [True, False, False]
