"""Training steps as CUDA graphs: on a small block a step is bound by starting its kernels, not by running them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..runtime.graphs import capture_key

logger = logging.getLogger("vdit_quant")

WARMUP = 3
"""Steps of a kind that run before one is captured: the optimizer makes its state in the first."""
LIMIT = 4
"""Graphs that are kept; further kinds of batches run as they are."""


class CapturedStep:
    """`step(batch)`, captured after its first runs and replayed from then on; on a CPU it just runs.

    step  one whole training step: it changes its state in place, returns nothing, never waits for the GPU, and does
          the same for every batch of the same shapes
    A batch is any tree of tensors and plain values; another combination of shapes is captured anew. What cannot be
    captured runs as it is, which is logged once.
    """

    def __init__(self, step: Callable[[Any], None]) -> None:
        self.step = step
        self.captures = 0
        self._failed = False
        self._runs: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

    def __call__(self, batch: Any) -> None:
        leaves, tree = pytree.tree_flatten(batch)
        key = None if self._failed else capture_key(leaves, tree)
        if key is None:
            return self.step(batch)
        if key not in self._graphs:
            self._runs[key] = self._runs.get(key, 0) + 1
            if self._runs[key] <= WARMUP or len(self._graphs) == LIMIT:
                return self._run_aside(batch)
            try:
                self._graphs[key] = self._capture(leaves, tree)
            except RuntimeError as error:
                self._failed = True
                _report((str(error).strip() or type(error).__name__).splitlines()[0])
                return self.step(batch)
        graph, inputs = self._graphs[key]
        torch._foreach_copy_(inputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        return graph.replay()

    def _run_aside(self, batch: Any) -> None:
        """On a stream of its own: what autograd keeps must not belong to the stream that a capture has to leave."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(batch)
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, leaves: list[Any], tree: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch = pytree.tree_unflatten(inputs, tree)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(batch)
        self.captures += 1
        return graph, [leaf for leaf in inputs if isinstance(leaf, Tensor)]


@functools.cache
def _report(reason: str) -> None:
    logger.warning("training steps run without CUDA graphs: %s", reason)
