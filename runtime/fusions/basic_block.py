"""`BasicTransformerBlock` with adaLN: the blocks of DiT ("ada_norm_zero") and of PixArt ("ada_norm_single")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.attention import attend
from ..fusion import FusedBlock, Fusion, any_held
from ..parts import Place
from ..stage import Norm, Stage, Sum, value_of
from ._stream import activation_of
from ._text import TextBlock


def attention_refusal(attention: Any) -> str | None:
    """Why an `Attention` cannot be fused; None when it can."""
    if type(attention.processor).__name__ != "AttnProcessor2_0":
        return f"attention processor {type(attention.processor).__name__}"
    odd = ("spatial_norm", "group_norm", "norm_q", "norm_k", "added_kv_proj_dim")
    if found := next((name for name in odd if getattr(attention, name, None) is not None), None):
        return f"attention with {found}"
    if attention.residual_connection or attention.rescale_output_factor != 1 or attention.norm_cross:
        return "attention with its own residual, rescaling or norm"
    return None


class FusedBasicBlock(TextBlock):
    """Twelve kernels a DiT block: norm + quantise, QKV, attention, quantise, projection + gate + residual, norm +
    quantise, up, activation + quantise, down + gate + residual, and its share of the modulation."""

    def __init__(self, block: nn.Module, cpu: bool = False) -> None:
        super().__init__(block, cpu)
        own: Any = block
        self.zero = own.norm_type == "ada_norm_zero"
        first, second = (own.norm1.norm, own.norm3) if self.zero else (own.norm1, own.norm2)
        self.norm1, self.norm2 = Norm.of(first), Norm.of(second)
        self.act = activation_of(own.ff.net[0]) or "none"
        self.qkv = Stage(*((own.attn1, name) for name in ("to_q", "to_k", "to_v")))
        self.out = Stage((own.attn1.to_out, "0"))
        self.up, self.down = Stage((own.ff.net[0], "proj")), Stage((own.ff.net, "2"))
        self.stages = (self.qkv, self.out, self.up, self.down)
        if self.cross_kv is not None:
            self.cross_q, self.cross_out = Stage((own.attn2, "to_q")), Stage((own.attn2.to_out, "0"))
            self.stages += (self.cross_q, self.cross_kv, self.cross_out)

    def forward(  # the block's own signature
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None or cross_attention_kwargs or not self.accepts(hidden_states):
            return self.own(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        b, t, width = hidden_states.shape
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self._modulate(b, hidden_states, timestep, class_labels)
        h = hidden_states.reshape(b * t, width)
        rows = self.qkv.norm(h, self.norm1, shift, scale)
        heads = self.block.attn1.heads
        q, k, v = self.qkv.product(rows).view(b, t, 3, heads, -1).unbind(2)
        total = self.out.sum(self.out.act(attend(q, k, v, None)), h, gate)
        if self.block.attn2 is not None:
            total = self._cross(value_of(total), b, encoder_hidden_states, encoder_attention_mask)
        h, rows = self.up.norm_sum(total, self.norm2, mlp_shift, mlp_scale)
        rows = self.down.act(self.up.product(rows), self.act)
        return self.down.add(rows, h, mlp_gate).view(b, t, width)

    def _modulate(self, batch: int, hidden_states: Tensor, timestep: Any, labels: Any) -> tuple[Tensor, ...]:
        """shift, scale and gate [B, K] of the attention, then of the feed-forward."""
        if not self.zero:
            tables = self.once("modulation", timestep, lambda: self._tables(batch, timestep))
            parts = self._table(batch, timestep) if tables is None else tables[self.place]
            return parts.unbind(1)
        norm = self.block.norm1
        assert self.modulation is not None

        def embed() -> Tensor:
            return norm.silu(norm.emb(timestep, labels, hidden_dtype=hidden_states.dtype))

        (parts,) = self.modulation.of(self.index, (timestep, labels), embed)
        return parts.chunk(6, dim=1)

    def _tables(self, batch: int, timestep: Tensor) -> Tensor | None:
        """[blocks, B, 6, K]: every block's own offsets, all added to the embedding at once; None where some may
        be elsewhere, as by offloading."""
        tables = [fused.block.scale_shift_table for fused in self.siblings]
        if any_held(self.siblings) or any(table.device != timestep.device for table in tables):
            return None
        return torch.stack(tables)[:, None] + timestep.reshape(1, batch, 6, -1)

    def _table(self, batch: int, timestep: Tensor) -> Tensor:
        """[B, 6, K]: the same for this block alone."""
        return self.block.scale_shift_table + timestep.reshape(batch, 6, -1)

    def _cross(self, h: Tensor, batch: int, encoder_hidden_states: Tensor | None, mask: Tensor | None) -> Sum:
        """Attention to the text, whose tokens every query sees; the input is not normalised (as in PixArt)."""
        attention = self.block.attn2
        source = h.view(batch, -1, h.shape[1]) if encoder_hidden_states is None else encoder_hidden_states
        length = source.shape[1]
        (q,) = self.cross_q.linear(self.cross_q.act(h))
        k, v = self.keys_and_values(source)
        if mask is not None:
            given = mask
            mask = self.once("mask", given, lambda: attention.prepare_attention_mask(given, length, batch))
            mask = mask.view(batch, attention.heads, -1, mask.shape[-1])
            mask = mask[:, :1] if len(given) == batch else mask  # one for all heads
        q = q.view(batch, -1, attention.heads, q.shape[1] // attention.heads)
        k, v = (x.unflatten(1, (attention.heads, -1)).unflatten(0, (batch, length)) for x in (k, v))
        return self.cross_out.sum(self.cross_out.act(attend(q, k, v, mask)), h)


class BasicBlock(Fusion):
    classes = ("BasicTransformerBlock",)

    def refusal(self, block: nn.Module) -> str | None:
        own: Any = block
        if own.norm_type not in ("ada_norm_zero", "ada_norm_single"):
            return f"norm type {own.norm_type}"
        if own.pos_embed is not None or getattr(own, "fuser", None) is not None or own._chunk_size is not None:
            return "positional embedding, fuser or chunked feed-forward inside the block"
        if own.only_cross_attention:
            return "no attention to itself"
        if own.norm_type == "ada_norm_zero" and own.attn2 is not None:
            return "cross-attention after ada_norm_zero"
        norms = (own.norm1.norm, own.norm3) if own.norm_type == "ada_norm_zero" else (own.norm1, own.norm2)
        if not all(map(Norm.knows, norms)):
            return "a norm that is not known"
        if activation_of(own.ff.net[0]) is None:
            return f"activation {type(own.ff.net[0]).__name__}"
        attentions = [a for a in (own.attn1, own.attn2) if a is not None]
        return next((r for r in map(attention_refusal, attentions) if r is not None), None)

    def build(self, block: nn.Module, cpu: bool) -> FusedBlock:
        return FusedBasicBlock(block, cpu)

    def modulators(self, block: nn.Module) -> list[Place]:
        own: Any = block
        return [(own.norm1, "linear")] if own.norm_type == "ada_norm_zero" else []

    def embedder(self, block: nn.Module) -> nn.Module | None:
        own: Any = block
        return own.norm1.emb if own.norm_type == "ada_norm_zero" else None


FUSION = BasicBlock()
