"""`JointTransformerBlock`: the blocks of SD3 and SD3.5 Large, image and text beside each other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention import attend
from ...kernels.head_norm_rope import head_norm_rope
from ..fusion import FusedBlock, Fusion
from ..parts import Place
from ..stage import Norm
from ._stream import TwoStreams, activation_of, heads_refusal, norm_weights


class FusedJointBlock(TwoStreams):
    def forward(  # the block's own signature
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if joint_attention_kwargs or not self.accepts(hidden_states):
            return self.own(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        b, t, width = hidden_states.shape
        length = encoder_hidden_states.shape[1]
        assert self.modulation is not None
        outputs = self.modulation.of(self.index, (temb,), lambda: F.silu(temb))
        mods, text_mods = (out.chunk(6, dim=1) for out in outputs)
        image, text = hidden_states.reshape(b * t, width), encoder_hidden_states.reshape(b * length, width)
        a = self.block.attn
        q, k, v = head_norm_rope(
            self.image.project(image, mods).view(b, t, -1), norm_weights(a.norm_q, a.norm_k),
            self.text.project(text, text_mods).view(b, length, -1), norm_weights(a.norm_added_q, a.norm_added_k),
            [], a.heads, 0.0 if a.norm_q is None else a.norm_q.eps,
        )  # fmt: skip
        attended = attend(q, k, v, None).view(b, t + length, -1)
        image = self.image.finish(image, attended[:, :t].reshape(b * t, -1), mods)
        text = self.text.finish(text, attended[:, t:].reshape(b * length, -1), text_mods)
        return text.view(b, length, width), image.view(b, t, width)


class JointBlock(Fusion):
    classes = ("JointTransformerBlock",)

    def refusal(self, block: nn.Module) -> str | None:
        own: Any = block
        if own.context_pre_only or own.use_dual_attention or own._chunk_size is not None:
            return "a block without text output, with two attentions, or with a chunked feed-forward"
        if not all(map(Norm.knows, (own.norm1.norm, own.norm2, own.norm1_context.norm, own.norm2_context))):
            return "a norm that is not known"
        if None in (activation_of(own.ff.net[0]), activation_of(own.ff_context.net[0])):
            return f"activation {type(own.ff.net[0]).__name__}"
        if type(own.attn.processor).__name__ != "JointAttnProcessor2_0":
            return f"attention processor {type(own.attn.processor).__name__}"
        a = own.attn
        return heads_refusal([a.norm_q, a.norm_k, a.norm_added_q, a.norm_added_k])

    def build(self, block: nn.Module, cpu: bool) -> FusedBlock:
        return FusedJointBlock(block, cpu)

    def modulators(self, block: nn.Module) -> list[Place]:
        own: Any = block
        return [(own.norm1, "linear"), (own.norm1_context, "linear")]


FUSION = JointBlock()
