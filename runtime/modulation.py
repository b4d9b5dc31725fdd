"""adaLN modulation of all blocks at once: they read one small embedding, so their layers are one product.

At M = batch rows such a layer is bound by reading its weight. One launch for all blocks reads it at full bandwidth;
one launch a block spends as long starting as reading. For the layers that are rotated the embedding is, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.layer import rotate
from ..quantize.spec import LayerSpec
from .linear import CompressedLinear
from .parts import Part, Place, is_plain, is_stale, layers_at, merge, reads_alike


class Modulation:
    """`blocks`: for every block, in the order they run, where its layers are that read the shared embedding.

    The first block's call computes the output of all layers; the others take theirs. Nothing is kept after the last.
    """

    def __init__(self, blocks: Sequence[Sequence[Place]]) -> None:
        self.sizes = [len(places) for places in blocks]
        self.places = tuple(place for places in blocks for place in places)
        self.last = max((i for i, size in enumerate(self.sizes) if size), default=-1)
        self.parts: list[Part] = []
        self.rotations: list[CompressedLinear] = []  # a layer of each
        self.inputs: list[int] = []  # of each part: which rotation it reads
        self.keeps: Callable[[], bool] = bool  # () -> False: the layers may be stored together anew
        self._source: Origin = ()
        self._embedding: Tensor | None = None
        self._outputs: list[list[Tensor]] = []  # none where the layers do not run as one

    def of(self, index: int, source: tuple[Tensor, ...], embed: Callable[[], Tensor]) -> list[Tensor]:
        """The outputs [B, N] of block `index`'s layers.

        source  the tensors that the embedding is made from: blocks that are given other ones compute their own
        embed   makes the embedding [B, K], as the layers read it
        """
        embedding = self._embedding
        if index == 0 or embedding is None or are_others(self._source, source):
            embedding = embed()
            self._source, self._embedding = origin(source), embedding
            self._outputs = self._by_block(self._product(embedding)) if self.ready() else []
        if self._outputs:
            outputs = self._outputs[index]
        else:  # each when it is due: the other blocks' may be elsewhere
            outputs = [layer(embedding) for layer in layers_at(self._by_block(self.places)[index])]
        if index == self.last:
            self._source, self._embedding, self._outputs = (), None, []
        return outputs

    def _by_block(self, flat: Sequence[Any]) -> list[Any]:
        ends = list(accumulate(self.sizes))
        return [flat[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]

    def _product(self, embedding: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        rotated = [rotate(embedding, layer.tensors(), layer.spec) for layer in self.rotations]
        for part, number in zip(self.parts, self.inputs, strict=True):
            y = part.spec.resolve().linear(rotated[number], part.tensors, LayerSpec(part.spec), part.bias)
            outputs += y.split(part.sizes, dim=1)
        return outputs

    def ready(self) -> bool:
        """Whether the layers run as one; joins them when their tensors have been moved or replaced since."""
        layers = layers_at(self.places)
        if not layers or not all(map(is_plain, layers)):
            return False
        # specs are compared here alone: a tracer cannot compare them
        if not torch.compiler.is_compiling() and is_stale(layers, self.parts):
            if self.keeps():
                self.forget()
                return False
            self._join([layer for layer in layers if isinstance(layer, CompressedLinear)])
        return len(self.parts) > 0

    def forget(self, *_: Any) -> None:
        """As `Stage.forget`."""
        self.parts = []

    def _join(self, layers: list[CompressedLinear]) -> None:
        """Makes the parts; none where a layer quantises or scales the embedding, or rotations of a kind differ."""
        kinds = list(dict.fromkeys(layer.spec.hadamard for layer in layers))
        numbers = [kinds.index(layer.spec.hadamard) for layer in layers]
        self.rotations, self.inputs = [layers[numbers.index(kind)] for kind in range(len(kinds))], []
        alike = all(reads_alike(self.rotations[i], layer) for i, layer in zip(numbers, layers, strict=True))
        self.parts = merge(tuple(layers)) if alike and all(map(_is_weight_only, layers)) else []
        for part in self.parts:
            self.inputs.append(numbers[0])
            del numbers[: len(part.sizes)]


Origin = tuple[tuple[Tensor, int], ...]
"""What something was made of for several blocks: tensors, and how often each had been written to."""


def origin(tensors: tuple[Tensor, ...]) -> Origin:
    return tuple((tensor, _version(tensor)) for tensor in tensors)


def are_others(known: Origin, given: tuple[Tensor, ...]) -> bool:
    """Whether a block is given other tensors than those that something was made of, or other values in them."""
    # one traced call gives every block the same tensors, and a tracer need not follow their identity
    if torch.compiler.is_compiling():
        return False
    return any(a is not b or _version(a) != version for a, (b, version) in zip(given, known, strict=True))


def _version(tensor: Tensor) -> int:
    # neither a tracer nor a tensor of inference mode has one
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _is_weight_only(layer: nn.Module) -> bool:
    """Whether it is, and has a kernel: without one, the weights of all blocks would be decoded at once."""
    assert isinstance(layer, CompressedLinear)
    spec = layer.spec
    return spec == LayerSpec(spec.weight, hadamard=spec.hadamard) and len(spec.weight.resolve().ops(spec)) > 0
