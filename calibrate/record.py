"""Recording what the linear layers of a running model see, in one pass, streaming."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.errors import InputError
from ..quantize.stats import LayerStats
from ..runtime.family import Family
from ..runtime.linear import input_of
from ..runtime.step import StepTracker
from .replay import Place

BINS = 10  # timestep bins of the recorded maxima
TEXT_LAYERS = ("*attn2.to_k", "*attn2.to_v", "*caption_projection.*")


class Recorder:
    """Context manager: hooks on the named linear layers gather `LayerStats` while the model runs.

    needs  layer name -> the statistics to gather for it
    bins   timestep bins: step s of `steps` falls into bin s * bins // steps
    rows   rows of each call to keep, for layers that need "rows"
    place  where the current call is in its sampling run, kept current by the caller; None: read off the model's calls

    Layers that are given the very same tensor (q, k and v of one attention) in every call share one `LayerStats`.
    Layers that read text do not count the tokens that the call's mask leaves out.
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
        self._last: tuple[str, Tensor, bool] | None = None  # whose statistics hold the last input, it, and only it
        self._owner: dict[str, str] = {}  # layer -> the layer whose statistics serve it as well
        self._before: dict[str, LayerStats] = {}  # such a layer -> these without an input it has not been given (yet)

    def __enter__(self) -> Recorder:
        self.tracker.__enter__()
        for name, kinds in self.needs.items():
            layer = self.model.get_submodule(name)
            hook = self._hook(name, kinds)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
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
        for name in tuple(self._before):
            self._part(name)
        for name in self.needs:
            stats = self.stats.get(self._owner.get(name, name))
            if stats is None or stats.count == 0:
                raise InputError(f"layer {name} never ran during calibration; exclude it with --keep '{name}'")
            if not torch.isfinite(stats.absmax).all():
                raise InputError(f"layer {name}: its input held NaN or infinity during calibration")
            out[name] = stats.finish()
        return out

    def _hook(self, name: str, kinds: frozenset[str]) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            if self._shares(name, x, kinds):
                return
            self._part(name)
            for other in self._sharing(name):
                if other in self._before:  # it was not given what this layer was given last
                    self._part(other)
            first = name not in self.stats
            if first:
                self.stats[name] = LayerStats.empty(x.shape[-1], kinds, self.bins, device=x.device)
            if sharing := self._sharing(name):
                self._before.update(dict.fromkeys(sharing, self.stats[name].clone()))
            self._add(self.stats[name], x, "rows" in kinds, is_text(name))
            self._last = name, x, first

        return observe

    def _sharing(self, name: str) -> list[str]:
        return [other for other, owner in self._owner.items() if owner == name]

    def _shares(self, name: str, x: Tensor, kinds: frozenset[str]) -> bool:
        """Whether the layer before was given this same tensor, and all others that this one was given, and gathers the
        same: then its statistics serve."""
        if self._last is None or self._last[1] is not x:
            return False
        owner, _, first = self._last
        if name in self._owner:
            return self._owner[name] == owner and self._before.pop(name, None) is not None
        if name in self.stats or not first or self.needs[owner] != kinds or is_text(owner) != is_text(name):
            return False
        self._owner[name] = owner
        return True

    def _part(self, name: str) -> None:
        """From here on a layer that shared statistics has its own."""
        owner, before = self._owner.pop(name, None), self._before.pop(name, None)
        if owner is not None:
            self.stats[name] = (self.stats[owner] if before is None else before).clone()

    def _add(self, stats: LayerStats, x: Tensor, keep: bool, text: bool) -> None:
        index = min(max(self.place.index, 0), self.steps - 1) * self.bins // self.steps
        branches, tokens = self.place.branches, self.place.text if text else None
        batch = x.shape[0] if x.dim() > 1 else 1
        parts: list[tuple[int, Any]] = [(branch, (branches == branch).to(x.device)) for branch in (0, 1)]
        if len(branches) != batch or len(set(branches.tolist())) == 1:
            parts = [(int(branches[0]) if len(branches) == batch else 0, slice(None))]
        for branch, rows in parts:
            part = x[rows]
            if tokens is not None and tokens.shape == x.shape[:-1]:
                part = part[tokens.to(x.device)[rows]]
            stats.update(part.reshape(-1, x.shape[-1]), index, branch, self.rows if keep else 0)


def is_text(name: str) -> bool:
    """Whether the layer reads the text alone, token by token. Only such layers may follow the text's mask: an image
    that happens to have as many tokens must not."""
    return any(fnmatchcase(name, glob) for glob in TEXT_LAYERS)
