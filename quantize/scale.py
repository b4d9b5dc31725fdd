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

    A format whose rows choose among several grids is searched on each, and a row gets the one on which its error is
    least. Ratio by ratio, the groups of a row could ask for different grids, and they share one.

    weight      float32 [N, K]
    importance  float32 [K] (mean square of each input channel), or None: every column counts the same
    returns     the scale tensors, and the chosen ratios float32 [N, groups]
    """
    first, *others = fmt.variants()
    scales, ratios, least = _search_one(weight, first, spec, importance)
    for other in others:
        found, found_ratios, error = _search_one(weight, other, spec, importance)
        better = error < least
        scales, least = fmt.merge(scales, found, better), torch.minimum(error, least)
        ratios = torch.where(better[:, None], found_ratios, ratios)
    return scales, ratios


def _search_one(
    weight: Tensor, fmt: ScalarFormat, spec: FormatSpec, importance: Tensor | None
) -> tuple[Tensors, Tensor, Tensor]:
    """`search_clip` on one grid; also the error of every row, float64 [N]."""
    n, k = weight.shape
    groups = group_count(k, spec)

    def loss_of(clip: Tensor | float) -> Tensor:
        scales = fmt.fit(weight, spec, clip)
        error = fmt.dequantize(fmt.quantize(weight, scales, spec), scales, spec) - weight
        loss = error.double().square()  # float64: matrices far from 1 must not lose their squares
        return (loss if importance is None else loss * importance).reshape(n, groups, -1).sum(-1)

    own = fmt.own_clip(weight, spec)
    before = best = loss_of(own)
    start = ratios = torch.ones_like(best, dtype=torch.float32) * own
    for ratio in CLIP_GRID:
        loss = loss_of(ratio)
        better = loss < best
        best = torch.where(better, loss, best)
        ratios = torch.where(better, ratio, ratios)
    # the groups of a row may share a scale, so ratios found one by one can be worse together: such a row stays as it is
    together, alone = loss_of(ratios).sum(1), before.sum(1)
    ratios = torch.where((together > alone)[:, None], start, ratios)
    return fmt.fit(weight, spec, ratios), ratios, torch.minimum(together, alone)
