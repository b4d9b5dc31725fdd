"""Choosing the range a scale covers: clipping searched by weighted squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from .format import ScalarFormat, Tensors, group_count
from .spec import FormatSpec

CLIP_GRID = tuple(1.0 - 0.025 * i for i in range(21))


def search_clip(
    weight: Tensor, fmt: ScalarFormat, spec: FormatSpec, importance: Tensor | None = None
) -> tuple[Tensors, Tensor]:
    """The scales that minimise `sum_k importance[k] (w - Q(w))^2` per row and group over a grid of clipping ratios.

    weight      float32 [N, K]
    importance  float32 [K] (mean square of each input channel), or None: every column counts the same
    returns     the scale tensors, and the chosen ratios float32 [N, groups]
    """
    n, k = weight.shape
    groups = group_count(k, spec)
    cost = torch.ones(k, device=weight.device) if importance is None else importance

    def loss_of(clip: Tensor | float) -> Tensor:
        scales = fmt.fit(weight, spec, clip)
        error = fmt.dequantize(fmt.quantize(weight, scales, spec), scales, spec) - weight
        return (error.square() * cost).reshape(n, groups, -1).sum(-1)

    own = fmt.own_clip(weight, spec)
    before = best = loss_of(own)
    start = ratios = torch.ones_like(best) * own
    for ratio in CLIP_GRID:
        loss = loss_of(ratio)
        better = loss < best
        best = torch.where(better, loss, best)
        ratios = torch.where(better, ratio, ratios)
    # the groups of a row may share a scale, so ratios found one by one can be worse together: such a row stays as it is
    worse = loss_of(ratios).sum(1) > before.sum(1)
    ratios = torch.where(worse[:, None], start, ratios)
    return fmt.fit(weight, spec, ratios), ratios
