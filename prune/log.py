"""What a training run tells of itself: means of its losses over the steps, and whether they have run away."""

from __future__ import annotations

import statistics
import time
from typing import Any

from torch import Tensor

from .plot import sparkline

_ENTRIES = 200
_EXPLODED = 10.0  # times the median loss: no random batch or mask makes that much


class TrainingLog:
    """At most about `_ENTRIES` entries of a run of `total` steps, each the means since the one before. The parts of a
    loss stay on their device in between, where reading them would make every step wait."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []
        self._sums: dict[str, Any] = {}
        self._summed = 0

    def add(self, parts: dict[str, Tensor], step: int, total: int, **more: float) -> None:
        """The parts of the loss at `step`, counted from 1; `more` is noted where that ends an entry."""
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._summed += 1
        if step % max(1, total // _ENTRIES) and step != total:
            return
        self.entries.append({"step": step, **self._means(), **more})
        self._sums, self._summed = {}, 0

    @property
    def has_exploded(self) -> bool:
        """Whether the loss of the last steps is far above what it was."""
        losses = [entry["loss"] for entry in self.entries]
        if self._summed:
            losses.append(self._means()["loss"])
        return len(losses) > 1 and not losses[-1] <= _EXPLODED * statistics.median(losses[:-1])

    def detail(self, steps: int, start: float) -> str:
        """The loss so far on one line, and the speed of `steps` since `start` on the monotonic clock."""
        rate = steps / max(1e-9, time.monotonic() - start)
        if not self.entries:
            return f"{rate:.1f} steps/s"
        losses = [entry["loss"] for entry in self.entries]
        return f"loss {losses[-1]:.4f} {sparkline(losses)} {rate:.1f} steps/s"

    def _means(self) -> dict[str, float]:
        return {name: float(f"{float(value) / self._summed:.6g}") for name, value in self._sums.items()}
