"""Large-DiT (Alpha-VLLM 2024), which TerDiT trains with ternary weights: `LargeDiT` here, `DiT_Llama` elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..family import Family
from .dit import NULL_LABEL


class LargeDit(Family):
    def branches(self, kwargs: Mapping[str, Any], batch: int, repeat: int) -> Tensor:
        labels = kwargs.get("class_labels")
        if labels is None or not (labels == NULL_LABEL).any():  # models of other classes count theirs otherwise
            return super().branches(kwargs, batch, repeat)
        return (labels == NULL_LABEL).long().cpu()

    def condition_shapes(self, model: nn.Module) -> dict[str, tuple[int | None, ...]]:
        return {"class_labels": ()}

    def conditions(self, model: nn.Module, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        config: Any = model.config
        return {"class_labels": torch.randint(config.num_classes, (count,), generator=generator)}

    def unconditional(self, model: nn.Module, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        config: Any = model.config
        return {"class_labels": torch.full_like(conditions["class_labels"], config.num_classes)}

    def latent_shape(self, model: nn.Module) -> tuple[int, ...]:
        config: Any = model.config
        return (config.in_channels, config.sample_size, config.sample_size)


FAMILY = LargeDit(
    name="large_dit",
    classes=("LargeDiT", "DiT_Llama"),
    blocks=("layers",),
    # an RMSNorm behind the modulation layer rules out folding a scale into it
    roles=(
        ("layers.*.attention.*", "attention"),
        ("layers.*.feed_forward.*", "feed_forward"),
        ("layers.*.adaLN_modulation.*", "modulation"),
        ("final_layer.*", "output"),
        ("?_embedder*", "embedder"),
    ),
    depths=("num_layers",),
)
