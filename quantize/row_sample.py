"""A sample of rows that come in calls: spread evenly over each call and over all calls, of bounded size."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # rows kept at most

# Multiples of an irrational number, modulo 1, fill the unit interval evenly and repeat with no period that a run has:
# tokens of a picture, samples of a batch, guidance branches that take turns. Two that are independent fill a square.
_PLACE = (5**0.5 - 1) / 2
_STAY = 2**0.5 - 1


class RowSample:
    """Rows are drawn a few of each call, and are numbered t = 0, 1, ... over all calls.

    A call is cut into as many equal parts as rows are drawn of it, and row t lies at frac(0.618 t) of its part: at
    one and the same place, all calls would give the same tokens. While frac(0.414 t) is below `share`, row t stays;
    whenever more than `limit` stay, `share` falls by a quarter.
    """

    def __init__(self, limit: int = ROWS) -> None:
        self.limit, self.share, self.drawn = limit, 1.0, 0
        self._parts: list[tuple[Tensor, Tensor]] = []  # numbers int64 [r] on the CPU, rows float32 [r, K]

    def __len__(self) -> int:
        return sum(len(numbers) for numbers, _ in self._parts)

    def add(self, x: Tensor, keep: int) -> None:
        """Draws `keep` rows of `x` float [rows, K]; all where there are no more."""
        count = min(keep, len(x))
        numbers = torch.arange(self.drawn, self.drawn + count)
        self.drawn += count
        edges = torch.arange(count + 1) * len(x) // max(1, count)
        at = edges[:-1] + (_fraction(numbers, _PLACE) * edges.diff()).long()
        stay = self._stays(numbers)
        if stay.any():
            self._parts.append((numbers[stay], x.detach()[at[stay].to(x.device)].float()))
        while len(self) > self.limit:
            self.share *= 0.75
            numbers, rows = (torch.cat(part) for part in zip(*self._parts, strict=True))
            stay = self._stays(numbers)
            self._parts = [(numbers[stay], rows[stay.to(rows.device)])]

    def rows(self) -> Tensor | None:
        """float32 [R, K] in the order they came; None where there is none."""
        return torch.cat([rows for _, rows in self._parts]) if self._parts else None

    def copy(self) -> RowSample:
        other = RowSample(self.limit)
        other.share, other.drawn, other._parts = self.share, self.drawn, list(self._parts)
        return other

    def _stays(self, numbers: Tensor) -> Tensor:
        return _fraction(numbers, _STAY) < self.share


def _fraction(numbers: Tensor, step: float) -> Tensor:
    return (numbers.double() * step) % 1.0
