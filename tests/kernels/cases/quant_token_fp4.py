from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import quant_token_fp4 as module
from vdit_quant.kernels.quant_token_fp4 import quant_token_fp4

from ._case import FLOATS, SIZES, TOKENS, Compile, run_twin, twin

OPS = {"quant_token_fp4": quant_token_fp4}
LIMITS = [
    ("quant_token_fp4", {"dtype": torch.float64}, "dtype torch.float64 is not supported"),
    ("quant_token_fp4", {"k": 65536}, "K=65536 is larger than 32768"),
]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {"quant_token_fp4": [(a.x, 0), (a.x.bfloat16(), 16)]}


def compile_cases() -> Iterator[Compile]:
    file, rows = twin("quant_token_fp4"), twin("quant_token")
    for k, group in ((1152, 0), (3072, 16), (15360, 32)):
        types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", **SIZES}
        constants = {"TINY": 1e-30, "LARGEST": 12.0, "BLOCK_LARGEST": 169.0, "GROUP": group}
        constants |= {**rows.launch_options(k), **rows.ROUND_EACH_STEP}
        yield Compile(f"K={k} group={group}", file.quant_token_fp4_kernel, types, constants)


def _compare(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=0)  # its sums may run in another order


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "group"), [(1, 0), (72, 0), (64, 16), (192, 32), (1152, 128)])
def interpreter_equals_reference(k: int, group: int, dtype: torch.dtype, make_layer) -> None:
    x = make_layer(9, k, 4).x.to(dtype)
    x[-1] = 0
    x[2, k // 2] = 100
    _compare(run_twin("quant_token_fp4", x, group), quant_token_fp4(x, group))


def interpreter_ties_and_rows_that_are_not_finite() -> None:
    x = torch.tensor([[12, 0.5, 1.5, 2.5, 5, -5, 7, 10, -10, 11, 3.5, -0.5, 0, 8, 6, 4.0]]).repeat(3, 1)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    for group in (0, 16):
        codes, scale = run_twin("quant_token_fp4", x, group)
        want, _ = quant_token_fp4(x, group)
        assert torch.equal(codes[0], want[0])
        assert torch.isfinite(scale).tolist() == [True, False, False]
    codes, _ = run_twin("quant_token_fp4", x, 0)
    assert codes[0].tolist() == [12, 0, 2, 2, 4, -4, 8, 8, -8, 12, 4, 0, 0, 8, 6, 4]


def interpreter_views_and_empty_batches(make_layer) -> None:
    x = make_layer(17, 144, 40).x[:, ::2]
    _compare(run_twin("quant_token_fp4", x, 0), quant_token_fp4(x, 0))
    assert run_twin("quant_token_fp4", x[:0], 0)[0].shape == (0, 72)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "group"), [(200, 0), (1152, 0), (1152, 16), (3072, 32), (15360, 128)])
def cuda_equals_reference(k: int, group: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        x = make_layer(m, k, 1, dtype=dtype, device="cuda").x
        x[-1] = 0
        _compare(quant_token_fp4(x, group), module._reference(x, group))


def cuda_rows_that_are_not_finite() -> None:
    x = torch.ones(3, 1152, device="cuda", dtype=torch.bfloat16)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    for group in (0, 16):
        assert torch.isfinite(quant_token_fp4(x, group)[1]).tolist() == [True, False, False]
