"""Defining an op: a torch.library op with a low price per call.

`torch.library.custom_op` wraps every call in Python (autograd, mutation checks): about 20 us, as long as a small kernel
runs. These ops are inference only and functional, so the plain registration below does: one Python call behind torch's
dispatcher. A backward pass through one is not defined; torch warns when it is tried.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "vdit_quant"
FAKES: dict[Any, Callable[..., Any]] = {}
"""Op -> what makes its results without their values: on real tensors, empty ones."""
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_keys = torch._C.DispatchKey
_autocast = torch._C.DispatchKeySet(_keys.AutocastCPU) | torch._C.DispatchKeySet(_keys.AutocastCUDA)


def as_written(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The same with autocast off: an op's dtypes are those that it says. What `torch.autocast(enabled=False)` does, at
    a tenth of the price."""

    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_autocast):
            return reference(*args, **kwargs)

    return run


class Op:
    """An op `vdit_quant::<name>`, called like the function that defines it. That function runs on every device without
    a kernel of its own."""

    def __init__(self, name: str, reference: Callable[..., Any]) -> None:
        self.name, self.__doc__ = name, reference.__doc__
        _library.define(name + torch.library.infer_schema(reference, mutates_args=()))
        _library.impl(name, as_written(reference), "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<op {NAMESPACE}::{self.name}>"

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results without the data: for torch.compile and meta tensors."""
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        FAKES[self.overload] = fake
        return fake

    def register_cuda(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """What runs on CUDA (and HIP) tensors."""
        _library.impl(self.name, kernel, "CUDA")
        return kernel


def define_op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: the function becomes the op `vdit_quant::<name>`, its definition on every device."""
    return lambda reference: Op(name, reference)


class Rehearsal(TorchDispatchMode):
    """Answers the ops of the package by their shapes alone, on real tensors with empty ones; all else runs."""

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called with each op before it is answered."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in FAKES:
            return func(*args, **kwargs)
        self.note(func, args, kwargs)
        return FAKES[func](*args, **kwargs)
