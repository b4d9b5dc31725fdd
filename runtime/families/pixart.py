"""PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2024): `PixArtTransformer2DModel`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..family import Family, Fold, value_fold


class PixArt(Family):
    def folds(self, model: nn.Module) -> list[Fold]:
        # Modulation is a table plus adaln_single, which every block shares, so nothing can be folded into it.
        found = []
        for name in self.block_names(model):
            block: Any = model.get_submodule(name)
            found += [value_fold(f"{name}.{a}", getattr(block, a).to_v.out_features) for a in ("attn1", "attn2")]
        return found

    def condition_shapes(self, model: nn.Module) -> dict[str, tuple[int | None, ...]]:
        config: Any = model.config
        return {"encoder_hidden_states": (None, config.caption_channels or config.cross_attention_dim)}

    def latent_shape(self, model: nn.Module) -> tuple[int, ...]:
        config: Any = model.config
        return (config.in_channels, config.sample_size, config.sample_size)


FAMILY = PixArt(
    name="pixart",
    classes=("PixArtTransformer2DModel",),
    blocks=("transformer_blocks",),
    roles=(
        ("adaln_single.*", "embedder"),
        ("caption_projection.*", "embedder"),
        ("transformer_blocks.*.attn1.*", "attention"),
        ("transformer_blocks.*.attn2.*", "attention"),
        ("transformer_blocks.*.ff.*", "feed_forward"),
        ("proj_out", "output"),
    ),
    depths=("num_layers",),
)
