"""`WanTransformerBlock`: the blocks of Wan, video tokens with a rotary embedding and attention to the text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...kernels.attention import attend
from ...kernels.head_norm_rope import head_norm_rope
from ..fusion import FusedBlock, Fusion
from ..stage import Norm, Stage, Sum, value_of
from ._stream import activation_of, heads_refusal, norm_weights
from ._text import TextBlock


class FusedWanBlock(TextBlock):
    def __init__(self, block: nn.Module, cpu: bool = False) -> None:
        super().__init__(block, cpu)
        own: Any = block
        self.norm1, self.norm3 = Norm.of(own.norm1), Norm.of(own.norm3)
        self.norm2 = Norm.of(own.norm2) if Norm.knows(own.norm2) else None
        self.act = activation_of(own.ffn.net[0]) or "none"
        self.qkv = Stage(*((own.attn1, name) for name in ("to_q", "to_k", "to_v")))
        self.out = Stage((own.attn1.to_out, "0"))
        self.cross_q, self.cross_out = Stage((own.attn2, "to_q")), Stage((own.attn2.to_out, "0"))
        self.up, self.down = Stage((own.ffn.net[0], "proj")), Stage((own.ffn.net, "2"))
        assert self.cross_kv is not None
        self.stages = (self.qkv, self.out, self.cross_q, self.cross_kv, self.cross_out, self.up, self.down)

    def forward(  # the block's own signature
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
    ) -> Tensor:
        if rotary_emb is None or not self.accepts(hidden_states):
            return self.own(hidden_states, encoder_hidden_states, temb, rotary_emb)
        b, t, width = hidden_states.shape
        # [B, 6, K], or [B, T, 6, K] where every token has a timestep of its own (Wan 2.2 TI2V)
        mods = (self.block.scale_shift_table + temb.float()).flatten(0, -3).unbind(1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mods
        h, a = hidden_states.reshape(b * t, width), self.block.attn1
        qkv = self.qkv.product(self.qkv.norm(h, self.norm1, shift, scale)).view(b, t, -1)
        rope = [table.float().reshape(t, -1) for table in rotary_emb]
        q, k, v = head_norm_rope(qkv, norm_weights(a.norm_q, a.norm_k), None, [], rope, a.heads, a.norm_q.eps)
        total = self._cross(self.out.sum(self.out.act(attend(q, k, v, None)), h, gate), encoder_hidden_states)
        h, rows = self.up.norm_sum(total, self.norm3, mlp_shift, mlp_scale)
        return self.down.add(self.down.act(self.up.product(rows), self.act), h, mlp_gate).view(b, t, width)

    def _cross(self, total: Sum, text: Tensor) -> Sum:
        a, (b, length, _) = self.block.attn2, text.shape
        if self.norm2 is None:
            h = value_of(total)
            rows = self.cross_q.act(h)
        else:
            h, rows = self.cross_q.norm_sum(total, self.norm2)
        (q,) = self.cross_q.linear(rows)
        k, v = self.keys_and_values(text)
        q, k = a.norm_q(q), a.norm_k(k)
        q = q.view(b, -1, a.heads, q.shape[1] // a.heads)
        k, v = (x.unflatten(1, (a.heads, -1)).unflatten(0, (b, length)) for x in (k, v))
        return self.cross_out.sum(self.cross_out.act(attend(q, k, v, None)), h)


class WanBlock(Fusion):
    classes = ("WanTransformerBlock",)

    def refusal(self, block: nn.Module) -> str | None:
        own: Any = block
        for attention in (own.attn1, own.attn2):
            processor = attention.processor
            if type(processor).__name__ != "WanAttnProcessor":
                return f"attention processor {type(processor).__name__}"
            if processor._attention_backend is not None or processor._parallel_config is not None:
                return "an attention back-end was chosen"
            if attention.add_k_proj is not None or attention.fused_projections:
                return "attention to an image, or projections fused by diffusers"
            if reason := heads_refusal([attention.norm_q, attention.norm_k]):
                return reason
        if not all(map(Norm.knows, (own.norm1, own.norm3))) or not (
            Norm.knows(own.norm2) or isinstance(own.norm2, nn.Identity)
        ):
            return "a norm that is not known"
        return None if activation_of(own.ffn.net[0]) else f"activation {type(own.ffn.net[0]).__name__}"

    def build(self, block: nn.Module, cpu: bool) -> FusedBlock:
        return FusedWanBlock(block, cpu)


FUSION = WanBlock()
