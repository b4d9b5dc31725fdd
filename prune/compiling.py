"""Compiling the blocks of a model from outside: one graph for all blocks of a kind, off again without a trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..calibrate.progress import Progress


@contextmanager
def compiled_blocks(models: Sequence[tuple[nn.Module, Sequence[str]]], on: bool) -> Iterator[Callable[[], None]]:
    """The named blocks of each model run compiled inside the block, where `on`. Yields what takes that back early."""
    blocks = [model.get_submodule(name) for model, names in models for name in names] if on else []

    def remove() -> None:
        while blocks:
            vars(blocks.pop()).pop("forward", None)

    for block in blocks:
        # hooks stay outside of what is compiled: only forward is replaced
        vars(block)["forward"] = torch.compile(block.forward, dynamic=False)
    try:
        yield remove
    finally:
        remove()


def rehearse(run: Callable[[], object], remove: Callable[[], None], progress: Progress) -> float:
    """Runs one step, in which everything compiles, and returns the seconds it took. Where that fails the blocks go on
    as they are, and it is said."""
    start = time.perf_counter()
    progress.note("compiling the blocks")
    try:
        run()
    except Exception as error:  # a compiler that is missing or broken must not cost the run
        remove()
        progress.note(f"blocks run uncompiled: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}")
    return time.perf_counter() - start
