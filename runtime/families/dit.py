"""DiT (class-conditional, Peebles & Xie 2022): `DiTTransformer2DModel`, run by `DiTPipeline`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..family import Family, Fold, modulation_fold, value_fold

NULL_LABEL = 1000  # DiTPipeline's label for the unguided branch


class Dit(Family):
    def pinned_blocks(self, model: nn.Module) -> tuple[str, ...]:
        # the output layer reads the first block's embedder; every block has an equal copy, unless they were tuned apart
        blocks = self.block_names(model)
        first, *others = (dict(model.get_submodule(f"{block}.norm1.emb").named_parameters()) for block in blocks)
        same = all(torch.equal(first[name], other[name]) for other in others for name in first)
        return () if same else (blocks[0],)

    def folds(self, model: nn.Module) -> list[Fold]:
        found = []
        for block in self.block_names(model):
            attention, norm = f"{block}.attn1", f"{block}.norm1.linear"
            projection: Any = model.get_submodule(f"{attention}.to_q")
            width, qkv = projection.in_features, tuple(f"{attention}.to_{name}" for name in "qkv")
            found += [
                # norm1.linear gives shift, scale and gate of the attention, then of the feed-forward
                modulation_fold(norm, qkv, width, shift=0, scale=1),
                modulation_fold(norm, (f"{block}.ff.net.0.proj",), width, shift=3, scale=4),
                value_fold(attention, projection.out_features),
            ]
        return found

    def branches(self, kwargs: Mapping[str, Any], batch: int, repeat: int) -> Tensor:
        labels = kwargs.get("class_labels")
        if labels is None or not (labels == NULL_LABEL).any():  # models of other classes count theirs otherwise
            return super().branches(kwargs, batch, repeat)
        return (labels == NULL_LABEL).long().cpu()

    def condition_shapes(self, model: nn.Module) -> dict[str, tuple[int | None, ...]]:
        return {"class_labels": ()}

    def conditions(self, model: nn.Module, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        labels = trained_labels(model)
        chosen = labels[torch.randint(len(labels), (count,), generator=generator)]
        return {"class_labels": chosen}

    def unconditional(self, model: nn.Module, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        config: Any = model.config
        return {"class_labels": torch.full_like(conditions["class_labels"], config.num_embeds_ada_norm)}

    def latent_shape(self, model: nn.Module) -> tuple[int, ...]:
        config: Any = model.config
        return (config.in_channels, config.sample_size, config.sample_size)


def trained_labels(model: nn.Module) -> Tensor:
    """int64: labels whose embedding is not all zero (a model trained on fewer classes leaves the others at zero)."""
    table: Any = model.get_submodule("transformer_blocks.0.norm1.emb.class_embedder.embedding_table")
    config: Any = model.config
    used = table.weight[: config.num_embeds_ada_norm].detach().float().abs().amax(1).cpu() > 0
    return used.nonzero()[:, 0] if used.any() else torch.arange(len(used))


FAMILY = Dit(
    name="dit",
    classes=("DiTTransformer2DModel",),
    blocks=("transformer_blocks",),
    roles=(
        ("*.emb.*", "embedder"),
        ("transformer_blocks.*.norm1.linear", "modulation"),
        ("transformer_blocks.*.attn1.*", "attention"),
        ("transformer_blocks.*.ff.*", "feed_forward"),
        ("proj_out_*", "output"),
    ),
    depths=("num_layers",),
)
