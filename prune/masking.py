"""Wrappers that act on blocks from outside, by hooks: taken off, they leave no trace in the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.linear import input_of

_LATENTS = "hidden_states"
# what a block of two streams returns, in this order
_STREAMS = ("encoder_hidden_states", _LATENTS)
_OTHER_STREAMS = {"CogVideoXBlock": (_LATENTS, "encoder_hidden_states")}


class _Streams:
    """Which argument of a block, the latents first of all, each of its results takes the place of."""

    def __init__(self, block: nn.Module) -> None:
        self.parameters = tuple(inspect.signature(block.forward).parameters)
        self.latents = _LATENTS if _LATENTS in self.parameters else self.parameters[0]
        self.order = _OTHER_STREAMS.get(type(block).__name__, _STREAMS)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def latents_of(self, output: Any) -> Tensor:
        """The latents' stream of what the block gives."""
        return output if isinstance(output, Tensor) else output[self.order.index(_LATENTS)]


class _Hooks:
    """Context manager base: hooks that exist while it is entered."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class Gates(_Hooks):
    """Context manager: block i gives `m_i block(x) + (1 - m_i) x`, with the mask in `masks`; without one, block(x).

    masks  float [n] or [] each, by block name. They must stay until the backward pass is over: with gradient
           checkpointing the blocks run once more in it
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()
        self.blocks = {name: model.get_submodule(name) for name in blocks}
        self.masks: dict[str, Tensor] = {}

    def __enter__(self) -> Gates:
        for name, block in self.blocks.items():
            hook = self._hook(name, _Streams(block))
            self._handles.append(block.register_forward_hook(hook, with_kwargs=True))
        return self

    @contextmanager
    def using(self, masks: dict[str, Tensor]) -> Iterator[None]:
        """The masks are in force inside the block."""
        self.masks = masks
        try:
            yield
        finally:
            self.masks = {}

    def _hook(self, name: str, streams: _Streams) -> Any:
        def blend(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if name not in self.masks:
                return None
            mask, given = self.masks[name], streams.given(args, kwargs)
            if isinstance(output, Tensor):
                return _blend(mask, output, given[streams.latents])
            return tuple(_blend(mask, o, given[stream]) for o, stream in zip(output, streams.order, strict=True))

        return blend


class Features(_Hooks):
    """Context manager: collects what the named blocks give, the latents' stream of it, into `outputs`."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()
        self.blocks = {name: model.get_submodule(name) for name in blocks}
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> Features:
        for name, block in self.blocks.items():
            self._handles.append(block.register_forward_hook(self._hook(name, _Streams(block))))
        return self

    def take(self) -> dict[str, Tensor]:
        """What has been collected, by block name; forgets it."""
        taken, self.outputs = self.outputs, {}
        return taken

    def _hook(self, name: str, streams: _Streams) -> Any:
        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self.outputs[name] = streams.latents_of(output)

        return keep


class Inputs(_Hooks):
    """Context manager: hands (block name, latents' stream in, the same out) of every block that runs to `see`."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], see: Any) -> None:
        super().__init__()
        self.blocks, self.see = {name: model.get_submodule(name) for name in blocks}, see

    def __enter__(self) -> Inputs:
        for name, block in self.blocks.items():
            self._handles.append(block.register_forward_hook(self._hook(name, _Streams(block)), with_kwargs=True))
        return self

    def _hook(self, name: str, streams: _Streams) -> Any:
        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.see(name, streams.given(args, kwargs)[streams.latents], streams.latents_of(output))

        return look


class Adapters(_Hooks):
    """Context manager: low-rank updates on every linear layer in the named blocks, `y + alpha / rank (x A^T) B^T`
    (Hu et al. 2022, arXiv 2106.09685). B starts at zero. `parameters` are A [rank, K] and B [N, rank], float32.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.active, self.scale = True, alpha / rank
        self.layers = {
            f"{block}.{name}": layer
            for block in blocks
            for name, layer in model.get_submodule(block).named_modules()
            if isinstance(layer, nn.Linear)
        }
        generator = torch.Generator().manual_seed(seed)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            bound = layer.in_features**-0.5
            down = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            up = torch.zeros(layer.out_features, rank)
            self.parameters[f"{name}.down"] = nn.Parameter(down.to(layer.weight.device))
            self.parameters[f"{name}.up"] = nn.Parameter(up.to(layer.weight.device))

    def __enter__(self) -> Adapters:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model is its own again inside the block."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def _hook(self, name: str) -> Any:
        down, up = self.parameters[f"{name}.down"], self.parameters[f"{name}.up"]

        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not self.active:
                return None
            x = input_of(args, kwargs)
            return output + self.scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)).to(output.dtype)

        return add


def _blend(mask: Tensor, output: Tensor, given: Tensor) -> Tensor:
    m = mask.to(output.dtype)
    m = m.view(-1, *(1 for _ in output.shape[1:])) if m.dim() else m
    return m * output + (1 - m) * given
