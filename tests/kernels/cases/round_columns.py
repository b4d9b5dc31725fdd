from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels import round_columns as module
from vdit_quant.kernels.round_columns import round_columns

from ._case import EVERYWHERE, HOPPER, Compile, run_twin, twin

OPS = {"round_columns": round_columns}
LIMITS = [
    ("round_columns", {"k": 128}, None),
    ("round_columns", {"k": 256}, "a block of 256 columns is larger than 128"),
]
LEVELS = (1, 2, 3, 15, 16, 64, 253, 255, 256)
"""How many the formats have, and the fewest that the op takes."""


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {"round_columns": [_problem(9, 16, 3, 15), _problem(5, 1, 1, 1)]}


def compile_cases() -> Iterator[Compile]:
    file = twin("round_columns")
    types = dict.fromkeys(("x_ptr", "level_ptr", "middle_ptr", "factor_ptr", "error_ptr"), "*fp32")
    types |= {**dict.fromkeys(("group_ptr", "index_ptr"), "*i64"), **dict.fromkeys(("N", "C", "L"), "i32")}
    types |= dict.fromkeys(("x_stride", "factor_stride"), "i32")
    for levels in (3, 16, 256):
        on = EVERYWHERE if levels == 16 else HOPPER
        yield Compile(f"{levels} levels", file.round_columns_kernel, types, file.launch_options(levels), on)


def _problem(n: int, c: int, groups: int, levels: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Arguments of which the targets and the factor are parts of wider matrices, as GPTQ has them, and the groups of
    neighbouring columns are any, as after ordering."""
    g = torch.Generator(device).manual_seed(n * 1009 + c * 31 + levels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    grid = normal(groups, n, levels).sort(-1).values
    factor = normal(c + 3, c + 3) * 0.1 + torch.diag(1 + normal(c + 3).abs())
    group = torch.randint(0, groups, (c,), generator=g, device=device)
    return normal(n, c + 7)[:, 5 : 5 + c], grid, _middles(grid), group, factor[2 : 2 + c, 2 : 2 + c]


def _middles(levels: Tensor) -> Tensor:
    return (levels[..., 1:] + levels[..., :-1]) / 2


def _assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    # To the bit, for one other code changes all the columns after it.
    assert torch.equal(got[0], want[0])
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, equal_nan=True)


def _odd() -> tuple[Tensor, ...]:
    """Targets on the middles, levels that repeat, and values that are not finite."""
    inf, nan = float("inf"), float("nan")
    levels = torch.tensor([[-2.0, -1, 0, 0, 0, 1, 3], [0, 0, 0, 0, 0, 0, 0], [-inf, -2, -1, 0, 1, 2, inf]])
    levels = torch.stack([levels, levels.flip(0)])
    targets = torch.tensor([[-1.5, 0, 2, 0.5, -9, 9], [1, -1, 0, nan, 1, 2], [inf, -inf, 1.5, nan, -1.5, 0.5]])
    factor = torch.diag(torch.tensor([1.0, 2, 0.5, 1, 4, 1])).contiguous()
    factor[2, 4], factor[3, 5] = 1, 2
    return targets, levels, _middles(levels), torch.tensor([0, 1, 0, 0, 1, 0]), factor


@pytest.mark.parametrize("levels", LEVELS)
def interpreter_equals_reference(levels: int) -> None:
    for n, c, groups in ((7, 6, 1), (4, 1, 2), (9, 17, 3)):
        args = _problem(n, c, groups, levels)
        _assert_same(run_twin("round_columns", *args), round_columns(*args))


def interpreter_a_whole_block() -> None:
    args = _problem(5, 128, 4, 16)
    _assert_same(run_twin("round_columns", *args), round_columns(*args))


def interpreter_ties_repeated_levels_and_what_is_not_finite() -> None:
    _assert_same(run_twin("round_columns", *_odd()), round_columns(*_odd()))


def interpreter_views_and_nothing_at_all() -> None:
    targets, levels, middles, group, factor = _problem(6, 5, 2, 15)
    args = (targets.T.contiguous().T, levels[:, :, ::2], middles[:, :, ::2], group, factor.T.contiguous().T)
    _assert_same(run_twin("round_columns", *args), round_columns(*args))
    for n, c in ((0, 4), (3, 0)):
        empty = _problem(n, c, 2, 3)
        _assert_same(run_twin("round_columns", *empty), round_columns(*empty))


@pytest.mark.parametrize("levels", LEVELS)
def cuda_equals_reference(levels: int) -> None:
    for n, c, groups in ((256, 128, 1), (1153, 128, 9), (1152, 72, 72), (3, 1, 1), (15360, 128, 4)):
        args = _problem(n, c, groups, levels, "cuda")
        # Every operation is rounded by itself, in the twin and in torch, on a GPU and on a CPU: no tie falls otherwise.
        got = round_columns(*args)
        _assert_same(got, module._reference(*args))
        if n < 1024:
            _assert_same(tuple(t.cpu() for t in got), round_columns(*(t.cpu() for t in args)))


def cuda_ties_repeated_levels_and_what_is_not_finite() -> None:
    got = round_columns(*(t.cuda() for t in _odd()))
    _assert_same(tuple(t.cpu() for t in got), round_columns(*_odd()))
