"""One call captured as a CUDA graph: what it reads, what it wrote, and what it was captured for."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass
class Capture:
    """One captured call: its graph, the tensors it reads, and what it wrote."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Any

    def replay(self, leaves: list[Any]) -> None:
        """Runs the call on the tensors among these leaves."""
        torch._foreach_copy_(self.inputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        self.graph.replay()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: memory is kept apart by stream, and a captured call reads what warming up has made."""
    return torch.cuda.Stream(device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Runs beside the current stream: what a call keeps must not belong to the stream that a capture has to leave."""
    with torch.cuda.device(device):
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's garbage collector waits: it may free another graph, which is not permitted while a stream is captured
    and ends the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def capture_call(
    call: Callable[[Any], Any], leaves: list[Any], tree: Any, warmup: int = 0, pool: Any = None
) -> Capture:
    """`call` on a copy of the tree with these leaves, which have a `capture_key`, captured after `warmup` runs."""
    device = device_of(leaves)
    inputs = [_ordinary(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    batch = pytree.tree_unflatten(inputs, tree)
    graph = torch.cuda.CUDAGraph()
    with _uncached_casts():
        if warmup:
            with aside(device):
                for _ in range(warmup):
                    call(batch)
        # what other threads do on the GPU meanwhile is their own affair
        where = torch.cuda.graph(graph, pool, _side_stream(device), capture_error_mode="thread_local")
        with torch.cuda.device(device), _uncollected(), where:
            outputs = call(batch)
    return Capture(graph, [leaf for leaf in inputs if isinstance(leaf, Tensor)], outputs)


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast casts parameters anew: those that it keeps are made outside of a graph, and freed when it ends."""
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _ordinary(tensor: Tensor) -> Tensor:
    """A copy that can be written to in inference mode and out of it."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(tensor).copy_(tensor)


def device_of(leaves: list[Any]) -> torch.device:
    """That of the first tensor."""
    return next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))


def capture_key(leaves: list[Any], tree: Any, state: Any = None) -> Any:
    """What a graph of a call with these arguments is captured for; None when it cannot be captured."""
    parts: list[Any] = []
    device: torch.device | None = None
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.device.type != "cuda" or device not in (None, leaf.device):
                return None
            device = leaf.device
            parts.append((tuple(leaf.shape), leaf.dtype, leaf.device))
        elif isinstance(leaf, PLAIN):
            parts.append((type(leaf), leaf))
        else:
            return None
    return None if device is None else (tree, tuple(parts), state)
