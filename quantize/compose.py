"""The steps that methods are made of, in the one order a layer runs them: scale, rotate, split off low rank, round.

Everything after the scale happens in the space the codes live in: the weight is `(W / s) R` and the Gram matrix of the
input `R^T diag(s) G diag(s) R`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..kernels.hadamard import SEEDS
from .format import ScalarFormat, Tensors, quantize_activation
from .gptq import DAMP, gptq, output_gain, refine
from .layer import LOW_RANK_DTYPE, dense_weight, rotate
from .low_rank import weighted_low_rank
from .method import FloatLayer
from .minifloat import ELEMENTS, Minifloat, element_rule
from .rotate import make_signs, rotate_gram, rotate_rows, unrotate_rows
from .scale import search_clip
from .smooth import AGGREGATES, aggregate_absmax, channel_scale, search_scale
from .spec import LayerSpec
from .stats import LayerStats
from .vector import VectorFormat, VectorRounding, round_to_vectors

CHOICES = {
    "smooth": ("none", "fixed", "search"),
    "aggregate": AGGREGATES,
    "rotate": ("always", "search"),
    "rounding": ("rtn", "gptq"),
    "clip": ("none", "weight", "output"),
    "element": ("search", "rule", *ELEMENTS),
    "branch": ("error", "weight"),
    "kind": tuple(SEEDS),
}
"""The words that parameters of these names may be: what a method that is made of these steps gives as its `choices`."""


BOUNDS = {
    "alpha": (0.0, 1.0),
    "damp": (1e-8, 1e3),
    "sweeps": (0, 1000),
    "rounds": (1, 1000),
    "rank": (0, math.inf),
    "hadamard": (0, math.inf),
}
"""What numbers of these names may be: `bounds` of the same methods."""


@dataclass(frozen=True)
class Choices:
    """What a method decides; a method's parameters are a subset of these fields.

    smooth     input scale: none, fixed (at `alpha`), or search (alpha by quantised-output error)
    alpha      exponent of the fixed scale
    aggregate  how the recorded maxima are reduced over time: max, mean, first
    fold       fold the scale into the producing layer where the model's family knows how (free at run time)
    rotate     what becomes of the spec's rotation: always, or search (left out where the output errs less without)
    rounding   rtn, or gptq
    damp, act_order, sweeps   GPTQ's damping and column order; extra sweeps of coordinate descent after it
    clip       search the covered range: none, weight (plain error), output (weighted by the inputs)
    element    for formats whose rows choose among elements: search, rule (see `element_rule`), or one for all
    unbiased   scale every rounded row so that its output, projected on the exact output, is the exact output
    noise      count what quantised activations add: their error, measured on recorded rows, joins the Gram matrix
    branch     what the low-rank branch starts from: error (of the rounded weight), or the weight itself
    rounds     alternations of quantising and splitting off the low-rank branch
    vectors    how codebooks are made, for methods that say more of it than `rounding`, `damp` and `act_order`
    """

    smooth: str = "none"
    alpha: float = 0.5
    aggregate: str = "max"
    fold: bool = True
    rotate: str = "always"
    rounding: str = "gptq"
    damp: float = DAMP
    act_order: bool = True
    sweeps: int = 0
    clip: str = "none"
    element: str = "search"
    unbiased: bool = False
    noise: bool = False
    branch: str = "error"
    rounds: int = 4
    vectors: VectorRounding | None = None

    @classmethod
    def of(cls, params: dict[str, Any]) -> Choices:
        """Picks the choices among a method's parameters, as `resolve_method` gives them."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in params.items() if key in known})

    def needs(self, rank: int = 0) -> frozenset[str]:
        """The statistics these choices are made from."""
        found = set()
        if self.smooth != "none":
            found |= {"absmax"} | ({"rows"} if self.smooth == "search" else set())
        if self.rounding == "gptq" or self.clip == "output" or self.unbiased or rank:
            found.add("gram")
        if self.noise or self.rotate == "search":
            found |= {"gram", "rows"}
        return frozenset(found)


def choose_scale(layers: list[FloatLayer], stats: LayerStats, specs: list[LayerSpec], choices: Choices) -> Tensor:
    """float32 [K]: the input scale of layers that read one input."""
    weights = [layer.weight for layer in layers]
    if choices.smooth == "search":
        return search_scale(weights, stats, specs, choices.aggregate)[0]
    return channel_scale(aggregate_absmax(stats, choices.aggregate), weights, choices.alpha)


def compress_linear(layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, choices: Choices) -> Tensors:
    """All tensors of `layer_layout(n, k, spec)` for one layer; of a searched rotation, see `settled_spec`."""
    if choices.rotate == "search" and spec.hadamard is not None and stats is not None:
        return _search_rotation(layer, stats, spec, dataclasses.replace(choices, rotate="always"))
    tensors: Tensors = {}
    weight = layer.weight
    gram = None if stats is None or stats.gram is None else stats.gram / max(1, stats.count)
    rows = stats.rows if choices.noise and stats is not None else None
    if spec.pre_scale:
        assert stats is not None
        scale = choose_scale([layer], stats, [spec], choices)
        tensors["pre_quant_scale"] = scale
        weight = weight / scale
        gram = None if gram is None else gram * scale * scale[:, None]
        rows = None if rows is None else rows * scale
    if spec.hadamard is not None:
        signs = make_signs(weight.shape[1]).to(weight.device)
        tensors["hadamard_signs"] = signs
        weight = rotate_rows(weight, signs, spec.hadamard)
        gram = None if gram is None else rotate_gram(gram, signs, spec.hadamard)
        rows = None if rows is None else rotate_rows(rows, signs, spec.hadamard)
    if gram is not None and rows is not None and spec.activation is not None:
        error = quantize_activation(rows, spec.activation) - rows
        gram = gram + error.square().mean(0).diag()
    if spec.rank:
        branch = split_low_rank(weight, gram, spec, choices, tensors.get("hadamard_signs"))
        tensors.update(branch)
        weight = weight - _branch_weight(branch, spec, tensors.get("hadamard_signs"))
    return {**tensors, **round_weight(weight, gram, spec, choices)}


def _search_rotation(layer: FloatLayer, stats: LayerStats, spec: LayerSpec, choices: Choices) -> Tensors:
    """With its rotation or without, whichever errs less: it evens out activations, but turns weights that fit a grid of
    integers well, being evenly spread, into a bell with tails."""
    plain = dataclasses.replace(spec, hadamard=None)
    ways = [(compress_linear(layer, stats, way, choices), way) for way in (spec, plain)]
    return min(ways, key=lambda way: recorded_error(layer.weight, stats, *way))[0]


def recorded_error(weight: Tensor, stats: LayerStats, tensors: Tensors, spec: LayerSpec) -> float:
    """Mean squared error of the output of a layer [N, K] on what calibration recorded: that of the weight on all of it,
    and that of quantised activations on the rows that were kept."""
    assert stats.gram is not None
    assert stats.rows is not None
    k = weight.shape[1]
    change = dense_weight(tensors, k, spec) - weight
    error = (change @ (stats.gram / max(1, stats.count)) * change).sum()
    if spec.activation is not None:
        scale = tensors.get("pre_quant_scale", stats.rows.new_ones(()))
        x = rotate(stats.rows * scale, tensors, spec)
        noise = quantize_activation(x, spec.activation) - x
        if spec.hadamard is not None:
            noise = unrotate_rows(noise, tensors["hadamard_signs"], spec.hadamard)
        rounded = dense_weight(tensors, k, dataclasses.replace(spec, rank=0))  # the branch reads exact activations
        error = error + (noise / scale @ rounded.T).square().sum(1).mean()
    return float(error)


def round_weight(weight: Tensor, gram: Tensor | None, spec: LayerSpec, choices: Choices) -> Tensors:
    """The format's tensors of a weight [N, K] that is already scaled and rotated, as `gram` is."""
    fmt = spec.weight.resolve()
    how = choices.vectors
    if how is None and choices.rounding == "gptq":
        how = VectorRounding(damp=choices.damp, act_order=choices.act_order)
    if isinstance(fmt, VectorFormat) and how is not None and gram is not None:
        return round_to_vectors(weight, gram, fmt, how)
    if not isinstance(fmt, ScalarFormat):
        return fmt.encode(weight, spec.weight)
    scales = fit_scales(weight, gram, spec, choices)
    if choices.rounding == "rtn" or gram is None:
        codes = fmt.quantize(weight, scales, spec.weight)
    else:
        codes = gptq(weight, gram, scales, spec.weight, choices.damp, choices.act_order)
        if choices.sweeps:
            codes = refine(codes, weight, gram, scales, spec.weight, choices.sweeps)
    if choices.unbiased and "weight_scale" in scales:
        rounded = fmt.dequantize(codes, scales, spec.weight)
        scales = {**scales, "weight_scale": scales["weight_scale"] * output_gain(weight, rounded, gram)}
    return fmt.store(codes, scales)


def fit_scales(weight: Tensor, gram: Tensor | None, spec: LayerSpec, choices: Choices) -> Tensors:
    """The format's scales, clipped and with elements chosen as `choices` say."""
    fmt = spec.weight.resolve()
    assert isinstance(fmt, ScalarFormat)
    if isinstance(fmt, Minifloat) and len(fmt.elements) > 1 and choices.element != "search":
        given = choices.element
        fmt = fmt.with_elements(element_rule(weight) if given == "rule" else ELEMENTS.index(given))
    if choices.clip == "none":
        return fmt.fit(weight, spec.weight)
    importance = gram.diagonal() if choices.clip == "output" and gram is not None else None
    return search_clip(weight, fmt, spec.weight, importance)[0]


def split_low_rank(
    weight: Tensor, gram: Tensor | None, spec: LayerSpec, choices: Choices, signs: Tensor | None
) -> Tensors:
    """The branch `U D` that absorbs what rounding loses: alternates rounding `W - U D` with the best rank-r fit of what
    is left of W, both as the inputs see it (the alternation of DiTAS and LoftQ, Li et al. 2023, arXiv 2310.08659).
    With `branch = "weight"` the first fit is that of W itself (SVDQuant, Li et al. 2024, arXiv 2411.05007): what is
    left is small, so that noise of quantised activations passes through little weight.

    weight, gram  in the space the codes live in; the branch itself reads the unrotated input
    """
    fmt = spec.weight.resolve()
    branch: Tensors = {}
    for number in range(max(1, choices.rounds)):
        target = weight
        if number or choices.branch == "error":
            rest = weight - _branch_weight(branch, spec, signs) if branch else weight
            stored = round_weight(rest, gram, spec, choices)
            target = weight - fmt.decode(stored, weight.shape[1], spec.weight)
        up, down = weighted_low_rank(target, gram if number or choices.branch == "error" else None, spec.rank)
        if spec.hadamard is not None:
            assert signs is not None
            down = unrotate_rows(down, signs, spec.hadamard)
        branch = {"proj_up": up.to(LOW_RANK_DTYPE), "proj_down": down.to(LOW_RANK_DTYPE)}
    return branch


def _branch_weight(branch: Tensors, spec: LayerSpec, signs: Tensor | None) -> Tensor:
    """float32 [N, K]: the branch as a dense weight in the space the codes live in."""
    down = branch["proj_down"].float()
    if spec.hadamard is not None:
        assert signs is not None
        down = rotate_rows(down, signs, spec.hadamard)
    return branch["proj_up"].float() @ down


def scaled_stats(stats: LayerStats, scale: Tensor) -> LayerStats:
    """The statistics of the input `x * scale`."""
    return LayerStats(
        absmax=stats.absmax * scale,
        second_moment=stats.second_moment * scale.square(),
        gram=None if stats.gram is None else stats.gram * scale * scale[:, None],
        rows=None if stats.rows is None else stats.rows * scale,
        count=stats.count,
    )


def pick(*names: str, **changed: Any) -> dict[str, Any]:
    """Parameters of a method: the named choices at their defaults, and `changed` ones at others."""
    values = {f.name: getattr(Choices(), f.name) for f in fields(Choices)}
    return {**{name: values[name] for name in names}, **changed}
