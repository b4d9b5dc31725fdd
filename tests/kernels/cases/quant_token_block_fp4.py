from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import quant_token_block_fp4 as module
from vdit_quant.kernels.block_scales import TINY
from vdit_quant.kernels.quant_token_block_fp4 import quant_token_block_fp4

from ._case import EVERYWHERE, FLOATS, HOPPER, SIZES, TOKENS, Compile, run_twin, twin

OP = "quant_token_block_fp4"
OPS = {OP: quant_token_block_fp4}
LIMITS = [
    (OP, {"dtype": torch.float64}, "dtype torch.float64 is not supported"),
    (OP, {"k": 65536}, "K=65536 is larger than 32768"),
]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {OP: [(a.x, 32), (a.x.bfloat16(), 16)]}


def compile_cases() -> Iterator[Compile]:
    file, rows = twin(OP), twin("quant_token")
    for k, group in ((1152, 16), (1152, 32), (15360, 16), (15360, 32)):
        types = {"x_ptr": "*bf16", "codes_ptr": "*u8", "block_ptr": "*u8", "scale_ptr": "*fp32", **SIZES}
        constants = {"TINY": TINY, "GROUP": group, **rows.launch_options(k), **rows.ROUND_EACH_STEP}
        on = EVERYWHERE if k == 1152 else HOPPER  # GPUs before 8.9 have no casts to e4m3
        yield Compile(f"K={k} group={group}", file.quant_token_block_fp4_kernel, types, constants, on)


def _compare(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=0)  # its sums may run in another order


def _spread(x: torch.Tensor, group: int) -> torch.Tensor:
    """x with blocks of very different sizes, a block of zeros, an outlier and a row of zeros."""
    m, k = x.shape
    sizes = torch.exp(4 * torch.sin(torch.arange(k // group, device=x.device))).repeat_interleave(group)
    x = (x.float() * sizes).to(x.dtype)
    x[m // 2, :group] = 0
    x[0, k // 2] = -1000
    x[-1] = 0
    return x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "group"), [(32, 32), (16, 16), (96, 32), (208, 16), (1152, 32), (1152, 16)])
def interpreter_equals_reference(k: int, group: int, dtype: torch.dtype, make_layer) -> None:
    x = _spread(make_layer(9, k, 4).x.to(dtype), group)
    _compare(run_twin(OP, x, group), quant_token_block_fp4(x, group))


@pytest.mark.parametrize("magnitude", [2.0**-149, 2.0**-126, 1e-30, 1e20, 3e38])
def interpreter_far_from_one(magnitude: float, make_layer) -> None:
    x = make_layer(5, 96, 4).x.clamp(-1, 1) * magnitude
    for group in (16, 32):
        _compare(run_twin(OP, x, group), quant_token_block_fp4(x, group))


def interpreter_ties_and_rows_that_are_not_finite() -> None:
    x = torch.tensor([6, 0.25, 0.75, 1.25, 2.5, -2.5, 3.5, 5, -5, 5.5, 1.75, -0.25, 0, 4, 3, 2.0])
    x = torch.cat((x, 448 * 6 * torch.ones(1), torch.zeros(31))).repeat(4, 1)[:, :32]
    x[1, 2], x[2, 5], x[3, 7] = float("nan"), float("inf"), -float("inf")
    for group in (16, 32):
        codes, block, scale = run_twin(OP, x, group)
        want = quant_token_block_fp4(x, group)
        assert torch.equal(codes[0], want[0][0])
        assert torch.equal(block[0], want[1][0])
        assert torch.isfinite(scale).tolist() == [True, False, False, False]


def interpreter_views_and_empty_batches(make_layer) -> None:
    x = make_layer(17, 192, 40).x[:, ::2]
    _compare(run_twin(OP, x, 32), quant_token_block_fp4(x, 32))
    assert [t.shape for t in run_twin(OP, x[:0], 16)] == [(0, 48), (0, 6), (0,)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("k", [224, 1152, 2240, 15360])
def cuda_equals_reference(k: int, group: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        x = _spread(make_layer(m, k, 1, dtype=dtype, device="cuda").x, group)
        _compare(quant_token_block_fp4(x, group), module._reference(x, group))


def cuda_equals_the_cpu(make_layer) -> None:
    x = _spread(make_layer(129, 1152, 1, dtype=torch.bfloat16, device="cuda").x, 16)
    for group in (16, 32):
        found = quant_token_block_fp4(x, group)
        _compare(tuple(t.cpu() for t in found), quant_token_block_fp4(x.cpu(), group))


def cuda_rows_that_are_not_finite() -> None:
    x = torch.ones(4, 1152, device="cuda", dtype=torch.bfloat16)
    x[1, 2], x[2, 5], x[3, 7] = float("nan"), float("inf"), -float("inf")
    for group in (16, 32):
        assert torch.isfinite(quant_token_block_fp4(x, group)[2]).tolist() == [True, False, False, False]
