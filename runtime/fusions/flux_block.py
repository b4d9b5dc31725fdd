"""The two kinds of FLUX blocks: text and image beside each other, then as one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention import attend
from ...kernels.head_norm_rope import head_norm_rope
from ..fusion import FusedBlock, Fusion
from ..parts import Place
from ..stage import Norm, Stage
from ._stream import TwoStreams, activation_of, heads_refusal, norm_weights


def flux_attention_refusal(attention: Any) -> str | None:
    """Why a `FluxAttention` cannot be fused; None when it can."""
    processor = attention.processor
    if type(processor).__name__ != "FluxAttnProcessor":
        return f"attention processor {type(processor).__name__}"
    if processor._attention_backend is not None or processor._parallel_config is not None:
        return "an attention back-end was chosen"
    names = ["norm_q", "norm_k", *(["norm_added_q", "norm_added_k"] if attention.added_kv_proj_dim else [])]
    if reason := heads_refusal([getattr(attention, name) for name in names]):
        return reason
    return "projections fused by diffusers" if attention.fused_projections else None


class FusedDoubleBlock(TwoStreams):
    def forward(  # the block's own signature
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if joint_attention_kwargs or hidden_states.dtype == torch.float16 or not self.accepts(hidden_states):
            return self.own(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        b, t, width = hidden_states.shape
        length = encoder_hidden_states.shape[1]
        assert self.modulation is not None
        outputs = self.modulation.of(self.index, (temb,), lambda: F.silu(temb))
        mods, text_mods = (out.chunk(6, dim=1) for out in outputs)
        image, text = hidden_states.reshape(b * t, width), encoder_hidden_states.reshape(b * length, width)
        a = self.block.attn
        q, k, v = head_norm_rope(
            self.text.project(text, text_mods).view(b, length, -1), norm_weights(a.norm_added_q, a.norm_added_k),
            self.image.project(image, mods).view(b, t, -1), norm_weights(a.norm_q, a.norm_k),
            list(image_rotary_emb or ()), a.heads, a.norm_q.eps,
        )  # fmt: skip
        attended = attend(q, k, v, None).view(b, length + t, -1)
        image = self.image.finish(image, attended[:, length:].reshape(b * t, -1), mods)
        text = self.text.finish(text, attended[:, :length].reshape(b * length, -1), text_mods)
        return text.view(b, length, width), image.view(b, t, width)


class _Joint:
    """The sequence that a single block made, by the two views it returned: the next block need not join them again."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        self.image: Tensor | None = None
        self.whole: Tensor | None = None

    def take(self, text: Tensor, image: Tensor) -> Tensor:
        whole = self.whole if text is self.text and image is self.image else None
        self.text = self.image = self.whole = None
        return torch.cat([text, image], dim=1) if whole is None else whole

    def split(self, whole: Tensor, length: int) -> tuple[Tensor, Tensor]:
        self.whole, self.text, self.image = whole, whole[:, :length], whole[:, length:]
        return self.text, self.image


class FusedSingleBlock(FusedBlock):
    def __init__(self, block: nn.Module, cpu: bool = False) -> None:
        super().__init__(block, cpu)
        own: Any = block
        self.norm = Norm.of(own.norm.norm)
        self.enter = Stage(*((own.attn, name) for name in ("to_q", "to_k", "to_v")), (own, "proj_mlp"))
        self.leave = Stage((own, "proj_out"))
        self.stages = (self.enter, self.leave)

    def forward(  # the block's own signature
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if joint_attention_kwargs or hidden_states.dtype == torch.float16 or not self.accepts(hidden_states):
            return self.own(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        length, joint = encoder_hidden_states.shape[1], self.shared.setdefault(_Joint, _Joint())
        whole = joint.take(encoder_hidden_states, hidden_states)
        b, t, width = whole.shape
        assert self.modulation is not None
        (out,) = self.modulation.of(self.index, (temb,), lambda: F.silu(temb))
        shift, scale, gate = out.chunk(3, dim=1)
        h, a = whole.reshape(b * t, width), self.block.attn
        y = self.enter.product(self.enter.norm(h, self.norm, shift, scale))
        qkv, mlp = y.split([3 * a.inner_dim, y.shape[1] - 3 * a.inner_dim], dim=1)
        rope, weights = list(image_rotary_emb or ()), norm_weights(a.norm_q, a.norm_k)
        heads = head_norm_rope(qkv.unflatten(0, (b, t)), weights, None, [], rope, a.heads, a.norm_q.eps)
        h = self.leave.add(self.leave.act(mlp, "gelu_tanh", attend(*heads, None)), h, gate)
        return joint.split(h.view(b, t, width), length)


class FluxBlock(Fusion):
    classes = ("FluxTransformerBlock", "FluxSingleTransformerBlock")

    def refusal(self, block: nn.Module) -> str | None:
        own: Any = block
        single = type(block).__name__ == "FluxSingleTransformerBlock"
        norms = [own.norm.norm] if single else [own.norm1.norm, own.norm2, own.norm1_context.norm, own.norm2_context]
        if not all(map(Norm.knows, norms)):
            return "a norm that is not known"
        if not single and None in (activation_of(own.ff.net[0]), activation_of(own.ff_context.net[0])):
            return f"activation {type(own.ff.net[0]).__name__}"
        return flux_attention_refusal(own.attn)

    def build(self, block: nn.Module, cpu: bool) -> FusedBlock:
        kind = FusedSingleBlock if type(block).__name__ == "FluxSingleTransformerBlock" else FusedDoubleBlock
        return kind(block, cpu)

    def modulators(self, block: nn.Module) -> list[Place]:
        own: Any = block
        single = type(block).__name__ == "FluxSingleTransformerBlock"
        return [(norm, "linear") for norm in ([own.norm] if single else [own.norm1, own.norm1_context])]


FUSION = FluxBlock()
