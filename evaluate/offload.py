"""Running a model whose blocks do not fit on the device together: each is there only while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.family import find_family
from ..runtime.source import Source
from .sampling import Sampler, make_sampler


class BlockStream:
    """Context manager: while it is entered, each of `blocks` is on `device` only while it runs, and the rest of the
    model, which must be on the CPU before, is there all the time. It computes what it does when all of it is there.

    Nothing is copied back: the weights stay on the CPU, what is on the device is a copy.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], device: torch.device) -> None:
        self.model, self.blocks, self.device = model, list(blocks), device
        self._handles: list[Any] = []
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {}  # block -> (tensor of the model, its CPU memory)
        self._users: dict[str, int] = {}  # block -> modules of it that are running, and holders, one in another

    def __enter__(self) -> BlockStream:
        inside = {id(t) for name in self.blocks for t in _tensors(self.model.get_submodule(name))}
        self._kept[""] = _place((t for t in _tensors(self.model) if id(t) not in inside), self.device)
        for name in self.blocks:
            block = self.model.get_submodule(name)
            for module in block.modules():  # a model may run a part of a block by itself: diffusers' DiT does
                fetch, drop = self._hooks(name)
                self._handles.append(module.register_forward_pre_hook(fetch, prepend=True))
                self._handles.append(module.register_forward_hook(drop, always_call=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for name in list(self._kept):
            self._drop(name)

    @contextmanager
    def held(self, block: str) -> Iterator[None]:
        """Keeps one block on the device while it is run several times."""
        self._use(block, self.model.get_submodule(block))
        try:
            yield
        finally:
            self._leave(block)

    def _use(self, block: str, part: nn.Module) -> None:
        """Fetches a part of a block unless what runs it has been fetched already."""
        self._users[block] = self._users.get(block, 0) + 1
        if self._users[block] == 1:
            self._fetch(block, part)

    def _leave(self, block: str) -> None:
        self._users[block] -= 1
        if not self._users[block]:
            self._drop(block)

    def _fetch(self, block: str, part: nn.Module) -> None:
        self._kept[block] = _place(_tensors(part), self.device)

    def _drop(self, block: str) -> None:
        for tensor, home in self._kept.pop(block, []):
            tensor.data = home

    def _hooks(self, block: str) -> tuple[Any, Any]:
        def fetch(module: nn.Module, args: Any) -> None:
            self._use(block, module)

        def drop(module: nn.Module, args: Any, output: Any) -> None:
            self._leave(block)

        return fetch, drop


@contextmanager
def open_sampler(
    source: Source, dtype: torch.dtype, device: torch.device, offload: bool, substitute: Source | None = None
) -> Iterator[tuple[Sampler, BlockStream | None]]:
    """A source's sampler on `device`; with `offload` its denoiser's blocks are streamed there, by the stream given.
    `substitute` as in `make_sampler`."""
    if not offload:
        yield make_sampler(source, dtype, device, substitute), None
        return
    sampler = make_sampler(source, dtype, torch.device("cpu"), substitute)
    components = getattr(getattr(sampler, "pipe", None), "components", {})
    denoisers = source.components
    for name, module in components.items():
        if isinstance(module, nn.Module) and name not in denoisers:
            module.to(device)
    models = [components[name] for name in denoisers] or [sampler.denoiser]
    with ExitStack() as stack:
        streams = [BlockStream(model, find_family(model).block_names(model), device) for model in models]
        for stream in streams:
            stack.enter_context(stream)
        yield sampler, next(stream for stream in streams if stream.model is sampler.denoiser)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _place(tensors: Any, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Copies each tensor's contents to the device, in place; returns where they were."""
    homes = []
    for tensor in tensors:
        homes.append((tensor, tensor.data))
        tensor.data = tensor.data.to(device)
    return homes
