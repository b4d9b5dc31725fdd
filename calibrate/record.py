"""Recording what the linear layers of a running model see, in one pass, streaming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.errors import InputError
from ..quantize.stats import LayerStats
from ..runtime.family import Family
from ..runtime.step import StepTracker
from .replay import Place

BINS = 10  # timestep bins of the recorded maxima


class Recorder:
    """Context manager: hooks on the named linear layers gather `LayerStats` while the model runs.

    needs  layer name -> the statistics to gather for it
    bins   timestep bins: step s of `steps` falls into bin s * bins // steps
    rows   rows of each call to keep, for layers that need "rows"
    place  where the current call is in its sampling run, kept current by the caller; None: read off the model's calls

    Layers that are given the very same tensor (q, k and v of one attention) share one `LayerStats`.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        needs: Mapping[str, frozenset[str]],
        steps: int,
        bins: int = BINS,
        rows: int = 16,
        place: Place | None = None,
    ) -> None:
        self.model, self.needs = model, needs
        self.steps, self.bins, self.rows = max(1, steps), max(1, min(bins, steps)), rows
        self.tracker = StepTracker(model, family)
        self.place: Place | StepTracker = self.tracker if place is None else place
        self.stats: dict[str, LayerStats] = {}
        self._handles: list[Any] = []
        self._last: tuple[str, Tensor] | None = None
        self._alias: dict[str, str] = {}

    def __enter__(self) -> Recorder:
        self.tracker.__enter__()
        for name, kinds in self.needs.items():
            layer = self.model.get_submodule(name)
            hook = self._hook(name, kinds)
            self._handles.append(layer.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: Any) -> None:
        self.tracker.__exit__()
        for handle in self._handles:
            handle.remove()
        self._last = None

    def go_to(self, place: Place) -> None:
        """The calls that follow are at this place of the sampling run, for a recorder made with a place."""
        self.place = place

    def result(self) -> dict[str, LayerStats]:
        """The statistics of every layer that ran. Raises InputError for one that did not, or saw NaN or infinity."""
        out = {}
        for name in self.needs:
            stats = self.stats.get(self._alias.get(name, name))
            if stats is None or stats.count == 0:
                raise InputError(f"layer {name} never ran during calibration; exclude it with --keep '{name}'")
            if not torch.isfinite(stats.absmax).all():
                raise InputError(f"layer {name}: its input held NaN or infinity during calibration")
            out[name] = stats.finish()
        return out

    def _hook(self, name: str, kinds: frozenset[str]) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if self._shares(name, x, kinds):
                return
            if name not in self.stats:
                self.stats[name] = LayerStats.empty(x.shape[-1], kinds, self.bins, device=x.device)
            self._add(self.stats[name], x, "rows" in kinds)

        return observe

    def _shares(self, name: str, x: Tensor, kinds: frozenset[str]) -> bool:
        """Whether the previous layer was given this same tensor and gathers the same: then its statistics serve."""
        last, self._last = self._last, (self._alias.get(name, name), x)
        if name in self.stats or last is None or last[1] is not x or self.needs[last[0]] != kinds:
            return False
        self._last = (last[0], x)
        self._alias[name] = last[0]
        return True

    def _add(self, stats: LayerStats, x: Tensor, keep: bool) -> None:
        index = min(max(self.place.index, 0), self.steps - 1) * self.bins // self.steps
        branches = self.place.branches
        batch = x.shape[0] if x.dim() > 1 else 1
        if len(branches) != batch or len(set(branches.tolist())) == 1:
            branch = int(branches[0]) if len(branches) == batch else 0
            stats.update(x.reshape(-1, x.shape[-1]), index, branch, self.rows if keep else 0)
            return
        for branch in (0, 1):
            part = x[(branches == branch).to(x.device)]
            stats.update(part.reshape(-1, x.shape[-1]), index, branch, self.rows if keep else 0)
