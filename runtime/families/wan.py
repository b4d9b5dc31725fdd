"""Wan 2.1 and 2.2 (Wan team 2025): `WanTransformer3DModel`, run by the Wan pipelines, one call a guidance branch."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..family import Family, Fold, value_fold


class Wan(Family):
    def folds(self, model: nn.Module) -> list[Fold]:
        # Modulation is a table plus a projection that every block shares, so nothing can be folded into it.
        found = []
        for name in self.block_names(model):
            block: Any = model.get_submodule(name)
            found.append(value_fold(f"{name}.attn1", block.attn1.to_v.out_features))
            if block.attn2.add_v_proj is None:  # with image conditions the output projection reads two sets of values
                found.append(value_fold(f"{name}.attn2", block.attn2.to_v.out_features))
        return found

    def condition_shapes(self, model: nn.Module) -> dict[str, tuple[int | None, ...]]:
        config: Any = model.config
        return {"encoder_hidden_states": (None, config.text_dim)}


FAMILY = Wan(
    name="wan",
    classes=("WanTransformer3DModel",),
    blocks=("blocks",),
    roles=(
        ("condition_embedder.*", "embedder"),
        ("blocks.*.attn1.*", "attention"),
        ("blocks.*.attn2.*", "attention"),
        ("blocks.*.ffn.*", "feed_forward"),
        ("proj_out", "output"),
    ),
    depths=("num_layers",),
    diffusion=False,
)
