"""The steps of GPTQ in one block of columns: by hand, and against the closed form for one row."""

import pytest
import torch

from vdit_quant.kernels.round_columns import round_columns

LEVELS = torch.tensor([-1.0, 0, 2]).repeat(2, 3, 1)
MIDDLES = torch.tensor([-0.5, 1]).repeat(2, 3, 1)
GROUP = torch.tensor([1, 0])
FACTOR = torch.tensor([[2.0, 0.5], [7, 4]])  # what is below the diagonal counts for nothing


def test_two_columns_by_hand() -> None:
    targets = torch.tensor([[-0.5, 0], [1.5, 1], [9, 1]])
    index, errors = round_columns(targets, LEVELS, MIDDLES, GROUP, FACTOR)
    # -0.5 and 1.5 leave 0.5 and -0.5, so errors of +-0.25, of which the next column takes half; 9 leaves 7
    assert index.tolist() == [[0, 1], [2, 2], [2, 0]]
    assert errors.tolist() == [[0.25, -0.125 / 4], [-0.25, (1.125 - 2) / 4], [3.5, (1 - 1.75 + 1) / 4]]
    assert targets.tolist() == [[-0.5, 0], [1.5, 1], [9, 1]]


def test_a_column_on_its_grid_changes_nothing_after_it() -> None:
    targets = torch.tensor([[2.0, 0.25], [0, 0.25], [-1, 0.25]])
    index, errors = round_columns(targets, LEVELS, MIDDLES, GROUP, FACTOR)
    assert index[:, 0].tolist() == [2, 1, 0]
    assert errors.tolist() == [[0, 0.0625]] * 3


@pytest.mark.parametrize(
    ("place", "other", "message"),
    [
        (0, torch.zeros(3, 2, dtype=torch.float64), r"targets torch.float32 \[N, C\]"),
        (0, torch.zeros(3), r"targets torch.float32 \[N, C\]"),
        (1, LEVELS[:, :2], r"levels torch.float32 \[G, 3, L\]"),
        (1, LEVELS[..., :0], "L > 0"),
        (2, LEVELS, r"middles torch.float32 \(2, 3, 2\)"),
        (3, GROUP.int(), r"group torch.int64 of shape \(2,\)"),
        (3, GROUP[:1], r"group torch.int64 of shape \(2,\)"),
        (4, FACTOR[:1], r"factor torch.float32 \(2, 2\)"),
    ],
)
def test_refuses_what_does_not_fit(place: int, other: torch.Tensor, message: str) -> None:
    given = [torch.zeros(3, 2), LEVELS, MIDDLES, GROUP, FACTOR]
    given[place] = other
    with pytest.raises(ValueError, match=f"round_columns: expected .*{message}"):
        round_columns(*given)
