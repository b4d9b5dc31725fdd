"""Compiling the kernels of a call side by side, before the call itself would compile them one after another.

The first call after a load compiles ten to twenty kernels, each of which waits for an assembler and a C compiler. Here
the call runs once with ops that only make outputs of the right shapes; what they would have launched is launched from
threads. The result is thrown away.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels import dispatch
from ..kernels.op import Rehearsal


def compile_ahead(call: Callable[[], object], where: AbstractContextManager[object] | None = None) -> int:
    """Compiles what `call` launches; returns how many launches differed.

    where  what to run it in, such as a stream; default: the current GPU and stream
    The call must not depend on the values that ops return, nor keep anything made of them. What fails to compile, or
    finds no memory, is left for the call itself to meet.
    """
    if dispatch.available().backend != "triton":
        return 0
    with where or nullcontext():
        ahead = _Ahead()
        try:
            # a function from torch.compile that dynamo first meets in here would stay uncompiled for good
            with ahead, torch.compiler.set_stance("force_eager"), suppress(torch.OutOfMemoryError):
                call()
        finally:
            ahead.finish()
    return len(ahead.seen)


class _Ahead(Rehearsal):
    """Sends the ops of the package to threads."""

    def __init__(self) -> None:
        super().__init__()
        self._threads: dict[Any, ThreadPoolExecutor] = {}
        self._at_once = threading.Semaphore(os.cpu_count() or 1)
        self.seen: set[Any] = set()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        traits = [_traits(leaf) for leaf in pytree.tree_leaves((args, kwargs))]
        key = func, *traits
        if key in self.seen:
            return
        self.seen.add(key)
        # what differs in the number of tokens alone is most often one kernel, which need not be compiled twice
        threads = self._threads.setdefault((func, *_but_for_tokens(traits)), ThreadPoolExecutor(1))
        threads.submit(contextvars.copy_context().run, self._launch, func, args, kwargs)

    def _launch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # on the caller's stream, where the memory of these tensors is reused in order
        with self._at_once, torch.no_grad(), torch.cuda.stream(self._stream):
            func(*args, **kwargs)

    def finish(self) -> None:
        """Waits for every launch."""
        for threads in self._threads.values():
            threads.shutdown()


def _traits(leaf: Any) -> Any:
    """What a kernel can be specialised for: shape, strides and dtype of a tensor, the value of anything else."""
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _but_for_tokens(traits: list[Any]) -> list[Any]:
    """The same for any number of tokens, which are the rows of the first tensor."""
    shapes = [trait[0] for trait in traits if isinstance(trait, tuple)]
    tokens = shapes[0][0] if shapes and shapes[0] else None
    return [
        (*(None if size == tokens else size for size in trait[0]), trait[2]) if isinstance(trait, tuple) else trait
        for trait in traits
    ]
