"""Training steps as CUDA graphs: on a small block a step is bound by starting its kernels, not by running them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

from ..quantize.errors import reason_of
from ..runtime.capture import Capture, aside, capture_call, capture_key, device_of

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
        self._graphs: dict[Any, Capture] = {}

    def __call__(self, batch: Any) -> None:
        leaves, tree = pytree.tree_flatten(batch)
        key = None if self._failed else capture_key(leaves, tree)
        if key is None:
            return self.step(batch)
        if key not in self._graphs:
            self._runs[key] = self._runs.get(key, 0) + 1
            if self._runs[key] <= WARMUP or len(self._graphs) == LIMIT:
                with aside(device_of(leaves)):
                    return self.step(batch)
            try:
                self._graphs[key] = capture_call(self.step, leaves, tree)
                self.captures += 1
            except RuntimeError as error:
                self._failed = True
                _report(reason_of(error))
                return self.step(batch)
        return self._graphs[key].replay(leaves)


@functools.cache
def _report(reason: str) -> None:
    logger.warning("training steps run without CUDA graphs: %s", reason)
