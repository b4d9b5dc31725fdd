"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): `SD3Transformer2DModel`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..family import Family, Fold, modulation_fold, value_fold


class Sd3(Family):
    def folds(self, model: nn.Module) -> list[Fold]:
        # Image and text values are attended together, so neither stream's values can be scaled alone.
        found = []
        for name in self.block_names(model):
            block: Any = model.get_submodule(name)
            attention, norm, context = f"{name}.attn", f"{name}.norm1.linear", f"{name}.norm1_context.linear"
            width: int = block.attn.to_q.in_features
            qkv, added = (tuple(f"{attention}.{n}" for n in names) for names in (_QKV, _ADDED))
            found.append(modulation_fold(norm, qkv, width, shift=0, scale=1))
            found.append(modulation_fold(norm, (f"{name}.ff.net.0.proj",), width, shift=3, scale=4))
            if block.context_pre_only:  # the last block: AdaLayerNormContinuous gives scale before shift
                found.append(modulation_fold(context, added, width, shift=1, scale=0))
            else:
                found.append(modulation_fold(context, added, width, shift=0, scale=1))
                found.append(modulation_fold(context, (f"{name}.ff_context.net.0.proj",), width, shift=3, scale=4))
            if block.use_dual_attention:  # 3.5: a second attention over the image alone
                second = tuple(f"{name}.attn2.{n}" for n in _QKV)
                found.append(modulation_fold(norm, second, width, shift=6, scale=7))
                found.append(value_fold(f"{name}.attn2", block.attn2.to_v.out_features))
        return found

    def condition_shapes(self, model: nn.Module) -> dict[str, tuple[int | None, ...]]:
        config: Any = model.config
        return {
            "encoder_hidden_states": (None, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }

    def latent_shape(self, model: nn.Module) -> tuple[int, ...]:
        config: Any = model.config
        return (config.in_channels, config.sample_size, config.sample_size)


_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

FAMILY = Sd3(
    name="sd3",
    classes=("SD3Transformer2DModel",),
    blocks=("transformer_blocks",),
    roles=(
        ("time_text_embed.*", "embedder"),
        ("context_embedder", "embedder"),
        ("transformer_blocks.*.norm1.linear", "modulation"),
        ("transformer_blocks.*.norm1_context.linear", "modulation"),
        ("transformer_blocks.*.attn.*", "attention"),
        ("transformer_blocks.*.attn2.*", "attention"),
        ("transformer_blocks.*.ff.*", "feed_forward"),
        ("transformer_blocks.*.ff_context.*", "feed_forward"),
        ("norm_out.linear", "output"),
        ("proj_out", "output"),
    ),
    diffusion=False,
)
