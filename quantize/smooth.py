"""Per-channel input scales: SmoothQuant's formula, statistics aggregated over time, and a search for its exponent.

One convention everywhere: the input is *multiplied* by `s` and the weight's columns are divided by it, with

    s_k = max_n|W_nk|^(1 - alpha) / A_k^alpha,    A_k = aggregated max|x_k|

(SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, eq. 4, as its reciprocal). `alpha = 0` only evens out the weight's
columns, 1 only the activation's channels. `s` is normalised to a geometric mean of 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import unknown
from .format import Format, quantize_activation
from .rotate import make_signs, rotate_rows
from .spec import LayerSpec
from .stats import LayerStats

AGGREGATES = ("max", "mean", "first")
ALPHA_GRID = tuple(i / 20 for i in range(21))
_FLOOR = 1e-4
_DEAD = 1e-3


def aggregate_absmax(stats: LayerStats, how: str) -> Tensor:
    """float32 [K]: the recorded |x| maxima over timestep bins and guidance branches, reduced to one a channel.

    max    over all steps and both branches: DiTAS's temporal aggregation (arXiv 2409.07756, section 3.2)
    mean   over timestep bins of the larger branch: ViDiT-Q's code path
    first  the first denoising steps alone: ViDiT-Q's paper (arXiv 2406.02540)
    """
    if how not in AGGREGATES:
        raise unknown("aggregate", how, AGGREGATES)
    by_bin = stats.absmax.amax(1)
    reduced = {"max": by_bin.amax(0), "mean": by_bin.mean(0), "first": by_bin[0]}[how]
    # a channel that never spoke says nothing about its size: it gets the average, not an extreme scale
    return torch.where(reduced < _DEAD * reduced.mean(), reduced.mean(), reduced).clamp_min(_FLOOR)


def channel_scale(act_absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """float32 [K]: the `s` of the module's docstring, shared by `weights` (float32 [N_i, K], which read one input)."""
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp_min(_FLOOR)
    scale = columns ** (1 - alpha) / act_absmax**alpha
    return scale / scale.log().mean().exp()


def search_scale(
    weights: Sequence[Tensor], stats: LayerStats, specs: Sequence[LayerSpec], aggregate: str
) -> tuple[Tensor, float | None]:
    """The scale, of those for every alpha in a grid and no scale at all, with the least error of the *quantised*
    output on the recorded rows (DiTAS's layer-wise grid search, arXiv 2409.07756, section 3.3, on the layer's own
    formats, rotation included).

    returns  scale float32 [K], and its alpha (None: no scale)
    """
    assert stats.rows is not None
    act = aggregate_absmax(stats, aggregate)
    best: tuple[float, Tensor, float | None] | None = None
    for alpha in (None, *ALPHA_GRID):
        scale = torch.ones_like(act) if alpha is None else channel_scale(act, weights, alpha)
        pairs = zip(weights, specs, strict=True)
        loss = sum(quantized_output_error(stats.rows, w, scale, spec) for w, spec in pairs)
        if best is None or loss < best[0]:
            best = (loss, scale, alpha)
    assert best is not None
    return best[1], best[2]


def quantized_output_error(rows: Tensor, weight: Tensor, scale: Tensor, spec: LayerSpec) -> float:
    """Squared error of the layer's output on `rows` [R, K] with weight and activation rounded to nearest."""
    x, w = rows * scale, weight / scale
    if spec.hadamard is not None:
        signs = make_signs(weight.shape[1]).to(weight.device)
        x, w = rotate_rows(x, signs, spec.hadamard), rotate_rows(w, signs, spec.hadamard)
    fmt: Format = spec.weight.resolve()
    rounded = fmt.decode(fmt.encode(w, spec.weight), w.shape[1], spec.weight)
    error = quantize_activation(x, spec.activation) @ rounded.T - rows @ weight.T
    return float(error.square().sum())
