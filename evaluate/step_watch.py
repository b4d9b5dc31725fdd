"""What is seen of a sampling run while it runs: the denoiser's latents at each step, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..runtime.step import StepTracker

Progress = Callable[[int, int], None]


def step_progress(progress: Progress, number: int, batches: int, steps: int) -> Callable[[int], None]:
    return lambda index: progress(min(number * steps + index + 1, batches * steps), batches * steps)


class StepWatch:
    """Hook that sees each denoiser call once the tracker is current: keeps latents, reports steps."""

    def __init__(self, tracker: StepTracker, count: int, keep: bool) -> None:
        self.tracker, self.count, self.keep = tracker, count, keep
        self.latents: list[Tensor] = []
        self.on_step: Callable[[int], None] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.tracker.repeat:
            return
        if self.on_step is not None:
            self.on_step(self.tracker.index)
        if self.keep and self.tracker.latents is not None:
            self.latents.append(self.tracker.latents[: self.count].detach().float().cpu().clone())
