"""What Hopper's attention kernel can load, which is asked for at every call."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
from vdit_quant.kernels._triton.attention_hopper import refusal

ROWS = "the rows of all samples do not follow each other at one distance"
QUERIES = "queries do not start at multiples of 16 bytes"
STARTS = "rows do not start at multiples of 16 bytes"


def heads(b: int, t: int, before: int = 0, after: int = 0, gap: int = 0) -> Tensor:
    """[b, t, 3, 72] with `before` and `after` elements beside each row, and `gap` rows between samples."""
    whole = torch.zeros(b, t + gap, before + 216 + after, dtype=torch.bfloat16)
    return whole[:, :t, before : before + 216].unflatten(2, (3, 72))


@pytest.mark.parametrize(
    ("q", "k", "v", "reason"),
    [
        (heads(2, 5), heads(2, 9), heads(2, 9), None),
        (heads(2, 5, 16, 8, 3), heads(2, 9, 216), heads(2, 9, 0, 216), None),
        (heads(1, 5), heads(1, 9, gap=3), heads(1, 9), None),
        (heads(2, 5), heads(2, 9, gap=3), heads(2, 9), ROWS),
        (heads(2, 5), heads(2, 9), heads(2, 9, gap=3), ROWS),
        (heads(2, 5), heads(2, 9)[..., :64], heads(2, 9)[..., :64], ROWS),
        (heads(2, 5), heads(2, 9), heads(2, 9).transpose(2, 3).contiguous().transpose(2, 3), ROWS),
        (heads(2, 5, after=4), heads(2, 9), heads(2, 9), QUERIES),
        (heads(2, 5).transpose(2, 3).contiguous().transpose(2, 3), heads(2, 9), heads(2, 9), QUERIES),
        (heads(2, 5, 4, 4), heads(2, 9), heads(2, 9), STARTS),
        (heads(2, 5), heads(2, 9, 4, 4), heads(2, 9), STARTS),
        (heads(2, 5), heads(2, 9), heads(2, 9, 4, 4), STARTS),
        (heads(2, 5), heads(2, 9, after=4), heads(2, 9), STARTS),
        (heads(2, 5), heads(2, 9), heads(2, 9, after=4), STARTS),
    ],
)
def test_what_it_cannot_load_has_a_reason(q: Tensor, k: Tensor, v: Tensor, reason: str | None) -> None:
    assert refusal(q, k, v) == reason
