"""Stored calls of a denoiser from real sampling runs, and replaying them with a part of the model changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.errors import InputError
from ..runtime.family import Family
from ..runtime.step import TIMESTEP_NAMES, StepTracker, bind_call, signature_of


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: its arguments, timesteps float32 [rows] (None: the model takes none), guidance branches
    int64 [rows] (0 conditional, 1 unconditional), the channels of its latents [rows, channels, ...], and of calls that
    were joined the first."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    timesteps: Tensor | None
    branches: Tensor
    channels: int | None
    first: Call | None = None

    def run(self, model: nn.Module) -> Tensor:
        """float32 [rows, channels, ...]: what the sampler uses of the model's output; the variance that some models
        predict in further channels is left out."""
        out = _first_tensor(model(*self.args, **self.kwargs))
        if self.channels is not None and out.dim() > 2 and out.shape[1] == 2 * self.channels:
            out = out[:, : self.channels]
        return out.detach().float()

    def row_weights(self, weight: Callable[[float], float] | None) -> Tensor | None:
        """float64 [rows]: the weight of each row's timestep; None when all count the same."""
        if weight is None or self.timesteps is None:
            return None
        return torch.tensor([weight(float(t)) for t in self.timesteps], dtype=torch.float64)


def probe_steps(steps: int, count: int = 5) -> frozenset[int]:
    """`count` of the steps 0..steps-1, evenly spread: the middles of `count` equal parts."""
    count = max(1, min(count, steps))
    return frozenset(int((i + 0.5) * steps / count) for i in range(count))


def capture(
    model: nn.Module,
    family: Family,
    run: Callable[[], Any],
    steps: frozenset[int] | None = None,
    limit: int | None = None,
) -> list[Call]:
    """Calls that `model` gets while `run()` runs, at the given steps of each sampling run (None: at all). Calls that
    can be are joined into one batch.

    limit  how many at most, of a run that may be long; it may cut through a sample. None: all

    Raises InputError when `run` does not call the model.
    """
    tracker = StepTracker(model, family)
    stored: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (limit is None or len(stored) < limit) and (steps is None or tracker.index in steps):
            stored.append(_call(model, _copy(args), _copy(kwargs), tracker.branches))

    with tracker, torch.no_grad():
        handle = model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            run()
        finally:
            handle.remove()
    if not stored:
        raise InputError(
            f"{type(model).__name__} was not called by the sampling run, so there is nothing to measure on"
        )
    return join(stored)


def join(calls: Sequence[Call]) -> list[Call]:
    """The calls as one, every tensor with a batch dimension concatenated; the calls as they are when that is not
    possible (arguments that differ and have no batch dimension)."""
    first = calls[0]
    if len(calls) == 1 or any(
        len(c.args) != len(first.args) or list(c.kwargs) != list(first.kwargs) or c.channels != first.channels
        for c in calls
    ):
        return list(calls)
    try:
        rows = [_rows(c) for c in calls]
        args = tuple(_join([c.args[i] for c in calls], rows) for i in range(len(first.args)))
        kwargs = {name: _join([c.kwargs[name] for c in calls], rows) for name in first.kwargs}
    except _Apart:
        return list(calls)
    steps = [c.timesteps for c in calls if c.timesteps is not None]
    timesteps = torch.cat(steps) if len(steps) == len(calls) else None
    return [Call(args, kwargs, timesteps, torch.cat([c.branches for c in calls]), first.channels, first)]


class Replay:
    """Runs the stored calls from a block on: earlier blocks return what they returned without any change.

    `seek` moves to a block, in the model's order only; `outputs` runs. On the way every block is checked: running from
    it without a change must give the full-precision output bit for bit. From the first block where that fails (blocks
    that read more than their predecessor's output, say) every run is a run of the whole model; `broken` names it.
    Of each list of blocks one output is held for each call.
    """

    def __init__(self, model: nn.Module, family: Family, calls: Sequence[Call]) -> None:
        self.model, self.calls = model, list(calls)
        self.order = family.block_names(model)
        self.broken: str | None = None
        self._start = 0  # blocks before this one can be replaced by their outputs
        self._held: list[dict[str, Any]] = [{} for _ in self.calls]  # for each call: block list -> output
        self._next: list[Any] = []  # for each call: output of the block at _start
        self._skips = False
        self.references = self._observe()
        if None in self._next:
            self._give_up()

    def seek(self, block: str) -> None:
        """The next `outputs` have their change in `block`; "": anywhere in the model."""
        target = self.order.index(block) if block else 0
        while self._start < target and self.broken is None:
            owner = self.order[self._start].rpartition(".")[0]
            for held, value in zip(self._held, self._next, strict=True):
                held[owner] = value
            self._start += 1
            self._check()
        self._skips = 0 < self._start == target and self.broken is None

    def outputs(self) -> Iterator[tuple[Call, Tensor, Tensor]]:
        """(call, the model's output now, its full-precision output) for every call, float32 [rows, ...]."""
        for call, held, reference in zip(self.calls, self._held, self.references, strict=True):
            with _Stubs(self.model, self._stubs(held) if self._skips else {}):
                output = call.run(self.model)
            yield call, output, reference

    def _check(self) -> None:
        """Runs from the block at _start with no change, and takes its output."""
        try:
            same = all(map(torch.equal, self._observe(), self.references)) and None not in self._next
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            same = False
        if not same:
            self._give_up()

    def _give_up(self) -> None:
        self.broken, self._held, self._next = self.order[self._start], [{} for _ in self.calls], []

    def _observe(self) -> list[Tensor]:
        """The model's outputs with the blocks before _start replaced; keeps the output of the block at _start."""
        outputs, self._next = [], []
        for call, held in zip(self.calls, self._held, strict=True):
            seen: list[Any] = []
            block = self.model.get_submodule(self.order[self._start]) if self.order else self.model
            handle = block.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(_copy(out)))
            try:
                with _Stubs(self.model, self._stubs(held)):
                    outputs.append(call.run(self.model))
            finally:
                handle.remove()
            self._next.append(seen[0] if len(seen) == 1 else None)  # None: did not run exactly once
        return outputs

    def _stubs(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """Block -> what it returns in place of running: its list's latest output, which is the one that is read."""
        return {name: held[name.rpartition(".")[0]] for name in self.order[: self._start]}


class _Stubs:
    """Context manager: the named blocks return copies of the given values instead of running."""

    def __init__(self, model: nn.Module, values: Mapping[str, Any]) -> None:
        self.blocks = [(model.get_submodule(name), value) for name, value in values.items()]
        self._before: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        for block, value in self.blocks:
            self._before.append({k: v for k, v in vars(block).items() if k == "forward"})
            vars(block)["forward"] = lambda *_, value=value, **__: _copy(value)

    def __exit__(self, *_: Any) -> None:
        for (block, _value), before in zip(self.blocks, self._before, strict=True):
            vars(block).pop("forward")
            vars(block).update(before)


class _Apart(Exception):
    """Calls that cannot be joined into one batch."""


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], branches: Tensor) -> Call:
    named = bind_call(signature_of(model), args, kwargs)
    latents = next((v for v in named.values() if isinstance(v, Tensor)), None)
    rows = 1 if latents is None else len(latents)
    timestep = next((named[name] for name in TIMESTEP_NAMES if named.get(name) is not None), None)
    steps = None
    if timestep is not None:
        given = torch.as_tensor(timestep, dtype=torch.float32).cpu()
        # of tokens with timesteps of their own, those of a frame that was given have none
        steps = given.flatten(1).amax(1) if given.dim() > 1 else given.flatten()
        steps = steps if len(steps) == rows else steps[:1].expand(rows)
    channels = latents.shape[1] if latents is not None and latents.dim() > 2 else None
    return Call(args, kwargs, steps, branches.clone(), channels)


def _rows(call: Call) -> int:
    found = (v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1)
    latents = next(found, None)
    if latents is None:
        raise _Apart
    return len(latents)


def _join(values: Sequence[Any], rows: Sequence[int]) -> Any:
    """One argument of several calls: concatenated where it has a row for each batch row, else the common value."""
    first = values[0]
    if all(isinstance(v, Mapping) and list(v) == list(first) for v in values):
        return {name: _join([v[name] for v in values], rows) for name in first}
    if all(isinstance(v, (tuple, list)) and len(v) == len(first) for v in values):
        return tuple(_join(parts, rows) for parts in zip(*values, strict=True))
    if not all(isinstance(v, Tensor) for v in values):
        if any(isinstance(v, Tensor) for v in values) or any(v is not first and v != first for v in values):
            raise _Apart
        return first
    if all(v.dim() and len(v) == n and v.shape[1:] == first.shape[1:] for v, n in zip(values, rows, strict=True)):
        return torch.cat(list(values))
    if all(v.numel() == 1 for v in values):
        return torch.cat([v.reshape(1).expand(n) for v, n in zip(values, rows, strict=True)])
    if all(v.shape == first.shape and torch.equal(v, first) for v in values):
        return first
    raise _Apart


def _copy(value: Any) -> Any:
    """The value with every tensor in it copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copy(v) for v in value)
    if type(value) is dict:
        return {name: _copy(v) for name, v in value.items()}
    return value


def _first_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: a tensor, a tuple, or an output with the field `sample`."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    found = next((v for v in values if isinstance(v, Tensor)), None)
    if found is None:
        raise InputError(f"the model returned a {type(output).__name__} without any tensor in it")
    return found
