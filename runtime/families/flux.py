"""FLUX.1 (Black Forest Labs 2024): `FluxTransformer2DModel`. Guidance is an input of the model, not a second branch."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..family import Family, Fold, modulation_fold


class Flux(Family):
    def folds(self, model: nn.Module) -> list[Fold]:
        # Image and text values are attended together, and a single block's proj_out reads [attention | MLP]: neither is
        # a fold into one layer.
        found = []
        for name in self.block_names(model):
            block: Any = model.get_submodule(name)
            width: int = block.attn.to_q.in_features
            qkv = tuple(f"{name}.attn.to_{n}" for n in "qkv")
            if name.startswith("single_"):
                readers = (*qkv, f"{name}.proj_mlp")
                found.append(modulation_fold(f"{name}.norm.linear", readers, width, shift=0, scale=1))
                continue
            added = tuple(f"{name}.attn.add_{n}_proj" for n in "qkv")
            for norm, readers, mlp in (("norm1", qkv, "ff"), ("norm1_context", added, "ff_context")):
                producer = f"{name}.{norm}.linear"
                found.append(modulation_fold(producer, readers, width, shift=0, scale=1))
                found.append(modulation_fold(producer, (f"{name}.{mlp}.net.0.proj",), width, shift=3, scale=4))
        return found

    def sigmas(self, steps: int) -> list[float] | None:
        return [1 - i / steps for i in range(steps)]

    def condition_shapes(self, model: nn.Module) -> dict[str, tuple[int | None, ...]]:
        config: Any = model.config
        return {
            "encoder_hidden_states": (None, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
            "img_ids": (None, len(config.axes_dims_rope)),
            "txt_ids": (None, len(config.axes_dims_rope)),
            **({"guidance": ()} if config.guidance_embeds else {}),
        }


FAMILY = Flux(
    name="flux",
    classes=("FluxTransformer2DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    roles=(
        ("time_text_embed.*", "embedder"),
        ("context_embedder", "embedder"),
        ("x_embedder", "embedder"),
        ("transformer_blocks.*.norm1.linear", "modulation"),
        ("transformer_blocks.*.norm1_context.linear", "modulation"),
        ("transformer_blocks.*.attn.*", "attention"),
        ("transformer_blocks.*.ff.*", "feed_forward"),
        ("transformer_blocks.*.ff_context.*", "feed_forward"),
        ("single_transformer_blocks.*.norm.linear", "modulation"),
        ("single_transformer_blocks.*.attn.*", "attention"),
        ("single_transformer_blocks.*.proj_mlp", "feed_forward"),
        ("single_transformer_blocks.*.proj_out", "feed_forward"),
        ("norm_out.linear", "output"),
        ("proj_out", "output"),
    ),
    timestep_scale=0.001,
    depths=("num_layers", "num_single_layers"),
    diffusion=False,
    shared=("img_ids", "txt_ids"),
)
