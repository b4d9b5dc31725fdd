"""Block by block instead of call by call: the inputs of the first block are kept from a real run, then each block runs
alone on all of them, and what it returns is what the next one reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..quantize.errors import InputError
from ..runtime.step import StepTracker

MEMORY = 4e9
"""Bytes of activations that are held in memory; further ones go to disk."""


@dataclass(frozen=True)
class _Source:
    """Where a block's argument comes from: "input", the first block's arguments, or "output", what the block before
    returned; `path` is the place in these, keys and positions from the outside in."""

    kind: str
    path: str


@dataclass
class Place:
    """Where a recorded call was in its sampling run; what a `Recorder` reads of a `StepTracker`."""

    index: int = 0
    branches: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    text: Tensor | None = None


class BlockChain:
    """Context manager: while `model` runs, keeps for every call what its first block was given; after `stop`, `run`
    runs one block after another on it.

    A block's arguments must be tensors that the block before returned, arguments of the first block, or constants.
    Raises InputError, from within the model's run, that names the block and the argument where that is not so.

    tracker  entered on `model` before
    folder   where activations go beyond `memory` bytes (None: `MEMORY`)
    """

    def __init__(
        self, model: nn.Module, blocks: list[str], tracker: StepTracker, folder: Path, memory: float | None = None
    ) -> None:
        self.model, self.blocks, self.tracker = model, blocks, tracker
        self.places: list[Place] = []
        limit = (MEMORY if memory is None else memory) / 2
        self.kept = {kind: _Store(folder, kind, limit) for kind in ("input", "output")}
        self._wiring: list[Any] = []  # for each block its (args, kwargs), with a _Source in the place of each tensor
        self._seen: dict[str, dict[int, tuple[str, Tensor, int]]] = {}
        self._next = 0
        self._handles: list[Any] = []

    def __enter__(self) -> BlockChain:
        self._handles.append(self.model.register_forward_pre_hook(self._begin))
        self._handles.append(self.model.register_forward_hook(self._end))
        for number, name in enumerate(self.blocks):
            block = self.model.get_submodule(name)
            self._handles.append(block.register_forward_pre_hook(self._before(number), with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._after))
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
        for store in self.kept.values():
            store.clear()

    @property
    def bytes(self) -> int:
        """Bytes of activations that are in memory now."""
        return sum(store.bytes for store in self.kept.values())

    def stop(self) -> None:
        """Ends the recording; what was recorded stays until the context ends."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}

    @torch.no_grad()
    def run(self, number: int, device: torch.device, before: Callable[[Place], None]) -> None:
        """Runs block `number`, which must be on `device`, on every recorded call; `before` is told each call's place.
        Blocks run in order, from 0, each once."""
        block, wiring = self.model.get_submodule(self.blocks[number]), self._wiring[number]
        for call, place in enumerate(self.places):
            held = {"input": self.kept["input"].get(call), "output": self.kept["output"].get(call) if number else {}}

            def fill(value: Any, path: str, held: Any = held) -> Any:
                return held[value.kind][value.path].to(device, copy=True) if isinstance(value, _Source) else value

            args, kwargs = _map(wiring, fill)
            before(place)
            output = block(*args, **kwargs)
            if number + 1 < len(self.blocks):
                self.kept["output"].put(call, {path: t for path, t in _leaves(output)})

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._next, self._seen = 0, {}

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._next < len(self.blocks):
            raise InputError(f"--offload: {self.blocks[self._next]} does not run in every call of the model")

    def _before(self, number: int) -> Any:
        name = self.blocks[number]

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._next != number:
                raise InputError(f"--offload: {name} does not run once and in its place in every call of the model")
            self._next += 1
            if number == 0:
                self._seen["input"] = _identities((args, kwargs))
                self.kept["input"].put(len(self.places), {path: t for path, t in _leaves((args, kwargs))})
                tracker = self.tracker
                self.places.append(Place(tracker.index, tracker.branches.clone(), tracker.text))
            wired = _map((args, kwargs), lambda value, path: self._source(name, value, path))
            if len(self._wiring) == number:
                self._wiring.append(wired)
            elif self._wiring[number] != wired:
                raise InputError(f"--offload: {name} is not given the same kinds of arguments in every call")

        return keep

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._seen["output"] = _identities(output)

    def _source(self, name: str, value: Any, path: str) -> Any:
        if not isinstance(value, Tensor):
            return value
        for kind in ("output", "input"):
            found = self._seen.get(kind, {}).get(id(value))
            if found is not None and found[2] == value._version:  # another version: written to since
                return _Source(kind, found[0])
        raise InputError(
            f"--offload: {name} cannot be run alone: its argument {path.rpartition('/')[2]} is neither what the block "
            f"before returned nor an argument of {self.blocks[0]}; calibrate without --offload"
        )


class _Store:
    """The tensors of each recorded call, on the CPU up to `limit` bytes, in files beyond."""

    def __init__(self, folder: Path, name: str, limit: float) -> None:
        self.folder, self.name, self.limit = folder, name, limit
        self.held: dict[int, dict[str, Tensor]] = {}
        self.bytes = 0  # in memory

    def put(self, call: int, tensors: dict[str, Tensor]) -> None:
        copies = {path: t.detach().to("cpu", copy=True).contiguous() for path, t in tensors.items()}
        size = _size(copies)
        self.bytes -= _size(self.held.pop(call, {}))
        if self.bytes + size <= self.limit:
            self.held[call] = copies
            self.bytes += size
        else:
            self._path(call).unlink(missing_ok=True)
            save_file(copies, self._path(call))

    def get(self, call: int) -> dict[str, Tensor]:
        return self.held[call] if call in self.held else load_file(self._path(call))

    def clear(self) -> None:
        self.held, self.bytes = {}, 0
        for path in self.folder.glob(f"{self.name}-*.activations"):
            path.unlink()

    def _path(self, call: int) -> Path:
        return self.folder / f"{self.name}-{call:06d}.activations"


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


def _identities(value: Any) -> dict[int, tuple[str, Tensor, int]]:
    """id -> path, the tensor itself (so that its id is not used again), and how often it was written to."""
    return {id(t): (path, t, t._version) for path, t in _leaves(value)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested tuples, lists and dicts with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}/{number}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")


def _map(value: Any, change: Callable[[Any, str], Any], path: str = "") -> Any:
    """The nested value with `change(leaf, path)` in the place of everything that is no tuple, list or dict."""
    if isinstance(value, (tuple, list)):
        return type(value)([_map(item, change, f"{path}/{number}") for number, item in enumerate(value)])
    if isinstance(value, dict):
        return {key: _map(item, change, f"{path}/{key}") for key, item in value.items()}
    return change(value, path)
