"""What calibration learns about one layer's input: streaming, mergeable, of bounded size."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .row_sample import ROWS, RowSample

CHUNK = 4096  # rows accumulated at a time
KINDS = ("absmax", "second_moment", "gram", "rows")


@dataclass
class LayerStats:
    """Statistics of the input X [rows, K] of one linear layer.

    absmax         float32 [bins, branches, K]  largest |x| by timestep bin and guidance branch (0 cond, 1 uncond)
    second_moment  float32 [K]                  sum over rows of x^2
    gram           float32 [K, K] or None       sum over rows of x x^T
    rows           float32 [R, K] or None       a sample of at most `ROWS` rows, spread over the run
    count          number of rows seen
    """

    absmax: Tensor
    second_moment: Tensor
    gram: Tensor | None = None
    rows: Tensor | None = None
    count: int = 0
    _kept: RowSample = field(default_factory=RowSample, repr=False)

    @classmethod
    def empty(
        cls, k: int, needs: frozenset[str], bins: int = 1, branches: int = 2, device: str | torch.device = "cpu"
    ) -> LayerStats:
        return cls(
            absmax=torch.zeros(bins, branches, k, device=device),
            second_moment=torch.zeros(k, device=device),
            gram=torch.zeros(k, k, device=device) if "gram" in needs else None,
        )

    def update(self, x: Tensor, bin_index: int, branch: int, keep: int = 0) -> None:
        """Adds rows `x` float [rows, K] seen at timestep bin `bin_index` in `branch`; draws `keep` of them."""
        place = self.absmax[bin_index, branch]
        for part in x.detach().split(CHUNK):  # a float32 copy of everything would double the run's memory
            rows = part.float()
            torch.maximum(place, rows.abs().amax(0), out=place)
            self.second_moment += rows.square().sum(0)
            if self.gram is not None:
                self.gram.addmm_(rows.T, rows)
        if keep:
            self._kept.add(x, keep)
        self.count += len(x)

    def finish(self) -> LayerStats:
        """Gathers the kept rows; call once, after the last update."""
        if len(self._kept):
            self.rows = self._kept.rows()
            self._kept = RowSample()
        return self

    def clone(self) -> LayerStats:
        """A copy that can be updated on its own."""
        return replace(
            self,
            absmax=self.absmax.clone(),
            second_moment=self.second_moment.clone(),
            gram=None if self.gram is None else self.gram.clone(),
            _kept=self._kept.copy(),
        )

    @property
    def importance(self) -> Tensor:
        """float32 [K]: mean of x^2, the weight of a column's error in the output error."""
        return self.second_moment / max(1, self.count)

    def channel_absmax(self) -> Tensor:
        """float32 [K]: largest |x| over all timesteps and branches (the temporal aggregation of DiTAS)."""
        return self.absmax.amax((0, 1))

    def to_tensors(self) -> dict[str, Tensor]:
        out = {"absmax": self.absmax, "second_moment": self.second_moment, "count": torch.tensor(self.count)}
        if self.gram is not None:
            out["gram"] = self.gram
        if self.rows is not None:
            out["rows"] = self.rows
        return {name: t.cpu().contiguous() for name, t in out.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LayerStats:
        return cls(
            absmax=tensors["absmax"],
            second_moment=tensors["second_moment"],
            gram=tensors.get("gram"),
            rows=tensors.get("rows"),
            count=int(tensors["count"]),
        )

    def to(self, device: str | torch.device) -> LayerStats:
        moved = {name: t.to(device) for name, t in self.to_tensors().items()}
        return LayerStats.from_tensors(moved)


def merge(first: LayerStats, second: LayerStats) -> LayerStats:
    """The statistics of both runs together, for runs split over processes."""
    both = [s for s in (first.rows, second.rows) if s is not None]
    rows = torch.cat(both) if both else None
    if rows is not None and len(rows) > ROWS:
        rows = rows[torch.arange(ROWS, device=rows.device) * len(rows) // ROWS]
    return LayerStats(
        absmax=torch.maximum(first.absmax, second.absmax),
        second_moment=first.second_moment + second.second_moment,
        gram=None if first.gram is None or second.gram is None else first.gram + second.gram,
        rows=rows,
        count=first.count + second.count,
    )
