"""CogVideoX and CogVideoX 1.5 (Yang et al. 2024): `CogVideoXTransformer3DModel`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...quantize.errors import InputError
from ..family import Family, Fold, value_fold


class CogVideoX(Family):
    def folds(self, model: nn.Module) -> list[Fold]:
        # Text and video go through one set of layers but are modulated by rows of their own, so a scale of what q, k, v
        # or the feed-forward read would have to go into two places of the modulation layer at once.
        found = []
        for name in self.block_names(model):
            block: Any = model.get_submodule(name)
            found.append(value_fold(f"{name}.attn1", block.attn1.to_v.out_features))
        return found

    def condition_shapes(self, model: nn.Module) -> dict[str, tuple[int | None, ...]]:
        config: Any = model.config
        if config.use_rotary_positional_embeddings:
            raise InputError(
                "CogVideoX with rotary positions gets them from its pipeline, and a bare transformer would run without "
                "any; name the pipeline's folder"
            )
        return {"encoder_hidden_states": (None, config.text_embed_dim)}

    def latent_shape(self, model: nn.Module) -> tuple[int, ...]:
        config: Any = model.config
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        frames += -frames % (config.patch_size_t or 1)  # as the pipeline pads them
        return (frames, config.in_channels, config.sample_height, config.sample_width)


FAMILY = CogVideoX(
    name="cogvideox",
    classes=("CogVideoXTransformer3DModel",),
    blocks=("transformer_blocks",),
    roles=(
        ("patch_embed.*", "embedder"),
        ("time_embedding.*", "embedder"),
        ("ofs_embedding.*", "embedder"),
        ("transformer_blocks.*.norm?.linear", "modulation"),
        ("transformer_blocks.*.attn1.*", "attention"),
        ("transformer_blocks.*.ff.*", "feed_forward"),
        ("norm_out.linear", "output"),
        ("proj_out", "output"),
    ),
    depths=("num_layers",),
    diffusion=False,
)
