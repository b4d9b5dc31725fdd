"""What a block is called with, and what it returns, by rows of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Streams = tuple[Tensor, ...]
"""What a block returns, without what is no activation: float [rows, ..., channels] each."""


@dataclass(frozen=True)
class BlockInput:
    """The arguments of one call of a block, taken apart; `batched` tells which of them have a row for each of the
    batch's."""

    leaves: list[Any]
    tree: pytree.TreeSpec
    batched: list[bool]

    @classmethod
    def of(cls, arguments: tuple[Any, Any], rows: int, fewer: tuple[Any, Any] | None) -> BlockInput:
        """(args, kwargs) of a call of `rows` rows. `fewer`: those of one of fewer rows, if there is one: a table of
        positions that happens to be as long as the batch has that length there too."""
        leaves, tree = pytree.tree_flatten(arguments)
        batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == rows for leaf in leaves]
        others, other_tree = pytree.tree_flatten(fewer)
        if tree == other_tree:
            lengths = [len(other) if isinstance(other, Tensor) and other.dim() else None for other in others]
            batched = [found and length != rows for found, length in zip(batched, lengths, strict=True)]
        return cls(leaves, tree, batched)

    def rows(self, chosen: Tensor) -> tuple[Any, Any]:
        """(args, kwargs) with the chosen rows, int64 [n], of the batch."""
        pairs = zip(self.leaves, self.batched, strict=True)
        leaves = [leaf[chosen.to(leaf.device)] if batched else leaf for leaf, batched in pairs]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return args, kwargs


def streams(output: Any) -> Streams:
    """The activations in what a block returns. None in their place is left out: the last block of some models has no
    more use for its text."""
    if isinstance(output, Tensor):
        return (output,)
    values = output.values() if isinstance(output, Mapping) else output
    return tuple(v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1)


def rows_of(given: Streams, chosen: Tensor) -> Streams:
    """The chosen rows of every stream that has as many as the first."""
    return tuple(stream[chosen] if len(stream) == len(given[0]) else stream for stream in given)
