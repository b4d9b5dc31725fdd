from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import quant_token_int4 as module
from vdit_quant.kernels.quant_token_int4 import quant_token_int4

from ._case import FLOATS, SIZES, TOKENS, Compile, run_twin, twin

OPS = {"quant_token_int4": quant_token_int4}
LIMITS = [
    ("quant_token_int4", {"dtype": torch.float64}, "dtype torch.float64 is not supported"),
    ("quant_token_int4", {"k": 65536}, "K=65536 is larger than 32768"),
]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {"quant_token_int4": [(a.x, 0), (a.x.bfloat16(), 16)]}


def compile_cases() -> Iterator[Compile]:
    file, rows = twin("quant_token_int4"), twin("quant_token")
    for k, group in ((1152, 0), (3072, 64), (15360, 16)):
        types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", **SIZES}
        constants = {"TINY": module.TINY, "GROUP": group, **rows.launch_options(k), **rows.ROUND_EACH_STEP}
        yield Compile(f"K={k} group={group}", file.quant_token_int4_kernel, types, constants)


def _compare(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=0)  # its sums may run in another order


def _spread(x: torch.Tensor, group: int) -> torch.Tensor:
    """x with groups of very different sizes, a group of zeros and rows of one sign and of zeros."""
    m, k = x.shape
    sizes = torch.exp(3 * torch.sin(torch.arange(k // (group or k), device=x.device))).repeat_interleave(group or k)
    x = (x.float() * sizes).to(x.dtype)
    x[m // 2, : group or 1] = 0
    x[0].abs_()
    x[m // 3] = -x[m // 3].abs()
    x[-1] = 0
    return x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "group"), [(1, 0), (72, 0), (64, 16), (192, 32), (320, 64), (1152, 128)])
def interpreter_equals_reference(k: int, group: int, dtype: torch.dtype, make_layer) -> None:
    x = _spread(make_layer(9, k, 4).x.to(dtype), group)
    x[2, k // 2] = 100
    _compare(run_twin("quant_token_int4", x, group), quant_token_int4(x, group))


@pytest.mark.parametrize("magnitude", [2.0**-149, 2.0**-126, 1e-30, 1e20, 3e38])
def interpreter_far_from_one(magnitude: float, make_layer) -> None:
    x = make_layer(5, 96, 4).x.clamp(-1, 1) * magnitude
    for group in (0, 32):
        _compare(run_twin("quant_token_int4", x, group), quant_token_int4(x, group))


def interpreter_ties_and_rows_that_are_not_finite() -> None:
    x = torch.tensor([[7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -8, 6.5, -7.5, 3, 0, -4, 5, 1, 2.0]]).repeat(4, 1)
    x[1, 2], x[2, 5], x[3, 5] = float("nan"), float("inf"), -float("inf")
    for group in (0, 16):
        codes, scale = run_twin("quant_token_int4", x, group)
        want, _ = quant_token_int4(x, group)
        assert torch.equal(codes[0], want[0])
        assert torch.isfinite(scale).tolist() == [True, False, False, False]
    codes, _ = run_twin("quant_token_int4", x, 0)
    assert codes[0].tolist() == [7, 0, 2, 2, 0, -2, -2, -8, 6, -8, 3, 0, -4, 5, 1, 2]


def interpreter_views_and_empty_batches(make_layer) -> None:
    x = make_layer(17, 144, 40).x[:, ::2]
    _compare(run_twin("quant_token_int4", x, 0), quant_token_int4(x, 0))
    assert run_twin("quant_token_int4", x[:0], 0)[0].shape == (0, 72)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "group"), [(200, 0), (1152, 0), (1152, 16), (2240, 64), (3072, 32), (15360, 128)])
def cuda_equals_reference(k: int, group: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        x = _spread(make_layer(m, k, 1, dtype=dtype, device="cuda").x, group)
        _compare(quant_token_int4(x, group), module._reference(x, group))


def cuda_equals_the_cpu(make_layer) -> None:
    x = _spread(make_layer(129, 1152, 1, dtype=torch.bfloat16, device="cuda").x, 64)
    for group in (0, 16, 64):
        codes, scale = quant_token_int4(x, group)
        _compare((codes.cpu(), scale.cpu()), quant_token_int4(x.cpu(), group))


def cuda_rows_that_are_not_finite() -> None:
    x = torch.ones(4, 1152, device="cuda", dtype=torch.bfloat16)
    x[1, 2], x[2, 5], x[3, 7] = float("nan"), float("inf"), -float("inf")
    for group in (0, 16):
        assert torch.isfinite(quant_token_int4(x, group)[1]).tolist() == [True, False, False, False]
