"""`CogVideoXBlock`: text and video as one sequence of tokens, each modulated in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention import attend
from ...kernels.head_norm_rope import head_norm_rope
from ..fusion import FusedBlock, Fusion
from ..parts import Place, is_hooked
from ..stage import Norm
from ._stream import Stream, activation_of, heads_refusal, norm_weights


class FusedCogVideoXBlock(FusedBlock):
    def __init__(self, block: nn.Module, cpu: bool = False) -> None:
        super().__init__(block, cpu)
        own: Any = block
        a = own.attn1
        # the layers of both: a product each reads the same weights twice, but nothing is joined before it
        self.stream = Stream(
            own.norm1, own.norm2.norm, [(a, "to_q"), (a, "to_k"), (a, "to_v")], (a.to_out, "0"), own.ff
        )
        self.stages = self.stream.stages

    def forward(  # the block's own signature
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        known = image_rotary_emb is None or image_rotary_emb[0].dtype == torch.float32
        # what was put on a layer sees one call of it, not one for the text and one for the video
        hooked = any(is_hooked(layer) for stage in self.stages for layer in stage.layers)
        if attention_kwargs or not known or hooked or not self.accepts(hidden_states):
            return self.own(hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
        b, t, width = hidden_states.shape
        length, a = encoder_hidden_states.shape[1], self.block.attn1
        assert self.modulation is not None
        outputs = self.modulation.of(self.index, (temb,), lambda: F.silu(temb))
        parts = [part for out in outputs for part in out.chunk(6, dim=1)]
        mods, text_mods = (*parts[:3], *parts[6:9]), (*parts[3:6], *parts[9:])
        video, text = hidden_states.reshape(b * t, width), encoder_hidden_states.reshape(b * length, width)
        rope = [] if image_rotary_emb is None else self._rope(image_rotary_emb, length)
        weights = norm_weights(a.norm_q, a.norm_k)
        q, k, v = head_norm_rope(
            self.stream.project(text, text_mods).view(b, length, -1), weights,
            self.stream.project(video, mods).view(b, t, -1), weights,
            rope, a.heads, 0.0 if a.norm_q is None else a.norm_q.eps,
        )  # fmt: skip
        attended = attend(q, k, v, None).view(b, length + t, -1)
        video = self.stream.finish(video, attended[:, length:].reshape(b * t, -1), mods)
        text = self.stream.finish(text, attended[:, :length].reshape(b * length, -1), text_mods)
        return video.view(b, t, width), text.view(b, length, width)

    def _rope(self, tables: tuple[Tensor, Tensor], length: int) -> list[Tensor]:
        """The cosines and sines of text, which is not turned, and video; made once for all blocks."""

        def join() -> list[Tensor]:
            return [F.pad(table, (0, 0, length, 0), value=1.0 - i) for i, table in enumerate(tables)]

        joined: list[Tensor] = self.once("rope", tables[0], join)
        return joined


class CogVideoXBlock(Fusion):
    classes = ("CogVideoXBlock",)

    def refusal(self, block: nn.Module) -> str | None:
        own: Any = block
        if type(own.attn1.processor).__name__ != "CogVideoXAttnProcessor2_0":
            return f"attention processor {type(own.attn1.processor).__name__}"
        if not all(map(Norm.knows, (own.norm1.norm, own.norm2.norm))):
            return "a norm that is not known"
        if activation_of(own.ff.net[0]) is None:
            return f"activation {type(own.ff.net[0]).__name__}"
        return heads_refusal([own.attn1.norm_q, own.attn1.norm_k])

    def build(self, block: nn.Module, cpu: bool) -> FusedBlock:
        return FusedCogVideoXBlock(block, cpu)

    def modulators(self, block: nn.Module) -> list[Place]:
        own: Any = block
        return [(own.norm1, "linear"), (own.norm2, "linear")]


FUSION = CogVideoXBlock()
