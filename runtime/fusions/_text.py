"""What blocks share that attend to a text: its keys and values are made for several of them at once."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..fusion import FusedBlock, any_held
from ..parts import Place
from ..stage import Stage

GROUP = 4
"""Blocks whose keys and values of the text are one product; with more, more of these would be held at a time."""


class TextBlock(FusedBlock):
    """A fused block whose `attn2`, if it has one, reads a text that all blocks are given."""

    cross_kv: Stage | None = None
    together: Stage | None = None  # cross_kv of this block and its neighbours

    def __init__(self, block: nn.Module, cpu: bool = False) -> None:
        super().__init__(block, cpu)
        if self.block.attn2 is not None:
            self.cross_kv = Stage((self.block.attn2, "to_k"), (self.block.attn2, "to_v"))

    def attach(self, modulators: list[Place]) -> None:
        super().attach(modulators)
        if self.cross_kv is not None:
            layers = self.cross_kv.layers
            self.loaded += tuple(layer.register_load_state_dict_post_hook(self._forget) for layer in layers)

    def rejoin(self, *_: Any) -> None:
        self._forget()
        super().rejoin()

    def _forget(self, *_: Any) -> None:
        if self.together is not None:
            self.together.forget()

    def join(self) -> None:
        super().join()
        group = self._group()
        if self.cross_kv is None or not self.block.attn2.is_cross_attention or self is not group[-1]:
            return
        together = Stage(*(place for block in group for place in block.cross_kv.places))
        together.keeps = partial(any_held, group)
        if together.ready():
            for block in group:
                block.together, block.cross_kv.parts = together, []

    def keys_and_values(self, text: Tensor) -> list[Tensor]:
        """[B * S, N] each, of a text [B, S, K]. A text is so few rows that the product of one block takes about as long
        to start as to run: where their layers allow it, one product serves a group."""
        assert self.cross_kv is not None
        rows, stage, group = text.reshape(-1, text.shape[2]), self.together, self._group()
        if stage is None or not stage.ready():
            return self.cross_kv.linear(self.cross_kv.act(rows))
        made: list[Tensor] = self.once("text", text, lambda: stage.linear(stage.act(rows)), group)
        at = 2 * group.index(self)
        return made[at : at + 2]

    def _group(self) -> Any:
        """This block and those whose keys and values are made with its own."""
        first = self.place - self.place % GROUP
        return self.siblings[first : first + GROUP]
