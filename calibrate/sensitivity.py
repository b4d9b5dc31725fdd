"""How much each layer's compression costs at the model's output: the table that `quantize.allocate` decides from.

Teacher-forced: the full-precision model runs on calls stored from real sampling runs (several timesteps and both
guidance branches in one batch), one layer at a time is swapped for its compressed version, and the change of the
model's output is the error of that (layer, candidate). Default error, over the batch rows b of weight v_b:

    error = sum_b v_b |y_b - r_b|^2 / |r_b|^2  /  sum_b v_b        y: with the swapped layer, r: without

Where the model's blocks run one after the other, the blocks before the changed one are not run again (see `Replay`).
With `Scoring.drift` it is what these errors add up to over a sampling run (see `drift`), which ranks layers better.
(ViDiT-Q, Zhao et al. 2024, arXiv 2406.02540, scores groups of layers by a metric of their own; `Scoring` takes any.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..evaluate.sampling import Sampler
from ..evaluate.workload import Workload
from ..quantize.allocate import QUALITY, Candidate, LayerCandidates
from ..quantize.errors import InputError
from ..quantize.format import Tensors
from ..quantize.layer import check_shape, layer_bytes
from ..quantize.spec import LayerSpec
from ..runtime.attach import attach_settled, detach
from ..runtime.family import Family
from .drift import Drift
from .plan import LayerPlan
from .probe import Call, Replay
from .progress import Progress
from .workspace import Workspace

Metric = Callable[[Tensor, Tensor], float]
Compress = Callable[[LayerPlan, LayerSpec], Tensors]
Scores = dict[str, tuple[float, Tensor | None]]
"""Spec -> the error and its effect."""
Offers = Sequence[tuple[LayerPlan, Sequence[LayerSpec]]]

SKETCH = 16384
# ViDiT-Q's groups: what cross-attention spoils is the agreement with the text, temporal attention the motion.
VIDITQ_GROUPS = {
    "alignment": ("*cross_attn*", "*attn2.*", "*add_[qkv]_proj*"),
    "temporal": ("*attn_temp*", "*temporal*", "*temp_attn*"),
}


@dataclass(frozen=True)
class Scoring:
    """What an error is.

    metrics          group -> metric(output, reference) of float32 [rows, ...] -> a finite number from 0, 0 when they
                     are equal; a group without one has the default error
    groups           group -> globs on layer names; the first group with a match has the layer, others are "quality"
    drift            the default error of `measure`, in the place of the relative one; needs calls with timesteps
    timestep_weight  timestep -> weight of its rows in the relative error; None: all the same
    tie              layer name -> key of the layers that get one common spec, "" for none; see `tie_qkv`
    """

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    drift: Drift | None = None
    timestep_weight: Callable[[float], float] | None = None
    tie: Callable[[str], str] | None = None

    def group_of(self, name: str) -> str:
        return next((g for g, globs in self.groups.items() if any(fnmatchcase(name, p) for p in globs)), QUALITY)

    def score(self, group: str, outputs: Sequence[tuple[Call, Tensor, Tensor]]) -> tuple[float, Tensor | None]:
        """The error of one change from (call, output, reference) of every call, and the effect whose squared length it
        is, sketched; None under a metric of the group's own. Means count rows."""
        metric = self.metrics.get(group)
        rows = [len(output) for _, output, _ in outputs]
        if metric is not None:
            scores = [float(metric(output, reference)) for _, output, reference in outputs]
            return sum(score * n for score, n in zip(scores, rows, strict=True)) / sum(rows), None
        if self.drift is not None:
            effect = self.drift.effect(*_trajectories(outputs))
        else:
            parts = [relative_effect(y, r, call.row_weights(self.timestep_weight)) for call, y, r in outputs]
            effect = torch.cat([part * math.sqrt(n / sum(rows)) for part, n in zip(parts, rows, strict=True)])
        return float(effect.square().sum()), sketch(effect)


def _trajectories(outputs: Sequence[tuple[Call, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(differences, timesteps, branches) of the rows of all calls. Raises InputError for calls without timesteps."""
    steps = [call.timesteps for call, _, _ in outputs if call.timesteps is not None]
    if len(steps) < len(outputs):
        raise InputError("drift: the model is called without timesteps; measure its output error, or samples")
    return torch.cat([y - r for _, y, r in outputs]), torch.cat(steps), torch.cat([c.branches for c, _, _ in outputs])


def relative_error(output: Tensor, reference: Tensor, weights: Tensor | None = None) -> float:
    """Weighted mean over rows of |y - r|^2 / |r|^2; float [rows, ...] each, weights float [rows] or None."""
    return float(relative_effect(output, reference, weights).square().sum())


def relative_effect(output: Tensor, reference: Tensor, weights: Tensor | None = None) -> Tensor:
    """float64 [elements]: the vector whose squared length is the relative error."""
    y, r = output.double().flatten(1), reference.double().flatten(1)
    shares = torch.ones(len(y), dtype=y.dtype) if weights is None else weights.double()
    shares = (shares / shares.sum()).to(y.device)
    scale = (shares / r.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return ((y - r) * scale[:, None]).flatten()


def sketch(effect: Tensor) -> Tensor:
    """float32 [at most SKETCH], on the CPU: a vector whose products with other sketches are about those of the effects.
    A longer one is added up into `SKETCH` sums with random signs (count sketch, Charikar et al. 2002): the products'
    error is 1 / sqrt(SKETCH) of the lengths, whatever the size of an image."""
    if len(effect) > SKETCH:
        generator = torch.Generator().manual_seed(0)
        place = torch.randint(SKETCH, (len(effect),), generator=generator).to(effect.device)
        sign = torch.randint(2, (len(effect),), generator=generator).to(effect) * 2 - 1
        effect = torch.zeros(SKETCH, dtype=effect.dtype, device=effect.device).index_add_(0, place, effect * sign)
    return effect.float().cpu()


def tie_qkv(name: str) -> str:
    """Ties the query, key and value projections of one attention, which kernels like to run as one."""
    head, _, last = name.rpartition(".")
    return f"{head}.qkv" if last in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj") else ""


def offers(layers: Sequence[LayerPlan], specs: Sequence[LayerSpec]) -> list[tuple[LayerPlan, list[LayerSpec]]]:
    """Each layer with those specs that its shape can hold. Raises InputError when there is none."""
    out = []
    for layer in layers:
        fitting, reason = [], ""
        for spec in specs:
            try:
                check_shape(layer.n, layer.k, spec, layer.name)
                fitting.append(spec)
            except InputError as error:
                reason = str(error)
        if not fitting:
            raise InputError(f"layer {layer.name}: none of the candidates fits; {reason or 'none was given'}")
        out.append((layer, fitting))
    return out


def unmeasured(offered: Offers, scoring: Scoring) -> list[LayerCandidates]:
    """The table of `measure` with every error 0: what is known of the candidates without the model."""
    return [_choices(layer, specs, {s.name: (0.0, None) for s in specs}, scoring) for layer, specs in offered]


@torch.no_grad()
def measure(
    model: nn.Module,
    family: Family,
    calls: Sequence[Call],
    offered: Offers,
    compress: Compress,
    scoring: Scoring | None = None,
    workspace: Workspace | None = None,
    progress: Progress | None = None,
) -> list[LayerCandidates]:
    """The table for `allocate`: every offered layer with its candidates' bytes and errors, in the order given.

    calls      stored calls of `model`, from `probe.capture`
    offered    layers with the specs each may get
    compress   (layer, spec) -> the tensors of `layer_layout`, on any device; without those of a rotation that the
               method leaves out
    workspace  where finished blocks are kept; a run with the same workspace goes on after them
    The model is left as it was. Raises InputError for a metric that gives no finite number from 0.
    """
    scoring, progress = scoring or Scoring(), progress or Progress()
    blocks: dict[str, list[tuple[LayerPlan, Sequence[LayerSpec]]]] = {}
    for layer, specs in offered:
        blocks.setdefault(layer.block or "", []).append((layer, specs))
    total, done = sum(len(specs) for _, specs in offered), 0
    progress.stage("measuring sensitivities", total)
    errors: dict[str, Scores] = {}
    replay = Replay(model, family, calls)
    for block in ["", *replay.order]:
        rows = blocks.pop(block, [])
        part = f"sensitivity-{block or 'outside'}"
        found = _restore(rows, workspace, part)
        if found is None:
            replay.seek(block)
            found = {}
            for layer, specs in rows:
                progress.advance(done + sum(map(len, found.values())), layer.name)
                found[layer.name] = {s.name: _error(replay, layer, s, compress(layer, s), scoring) for s in specs}
            if workspace is not None and rows:
                workspace.save(part, _pack(found))
        errors.update(found)
        done += sum(map(len, found.values()))
    assert not blocks, f"layers of blocks that the family does not list: {sorted(blocks)}"
    if replay.broken is not None:
        progress.note(f"from {replay.broken} on, whole runs of the model were needed: its blocks are not a plain chain")
    progress.advance(done, "all candidates")
    return [_choices(layer, specs, errors[layer.name], scoring) for layer, specs in offered]


@torch.no_grad()
def measure_samples(
    sampler: Sampler,
    workload: Workload,
    offered: Offers,
    compress: Compress,
    scoring: Scoring | None = None,
    workspace: Workspace | None = None,
    progress: Progress | None = None,
) -> list[LayerCandidates]:
    """The same table from whole sampling runs with one layer compressed at a time: what ViDiT-Q scores.

    Errors are those of the finished samples, so they count what the sampler makes of an early or a late mistake, and
    any metric on images serves. It costs a sampling run of `workload` for each (layer, candidate).
    """
    scoring, progress = scoring or Scoring(), progress or Progress()
    model, reference = sampler.denoiser, sampler.run(workload).images
    progress.stage("measuring sensitivities on samples", sum(len(specs) for _, specs in offered))
    errors: dict[str, Scores] = {}
    for layer, specs in offered:
        part = f"sampled-{layer.name}"
        found = _restore([(layer, specs)], workspace, part)
        if found is None:
            progress.advance(sum(map(len, errors.values())), layer.name)
            group = scoring.group_of(layer.name)
            metric, row = scoring.metrics.get(group), Scores()
            for spec in specs:
                originals = attach_settled(model, {layer.name: spec}, {layer.name: compress(layer, spec)})
                try:
                    images = sampler.run(workload).images
                finally:
                    detach(model, originals)
                if metric is None:
                    effect = relative_effect(images, reference)
                    row[spec.name] = _checked(float(effect.square().sum()), layer, spec, group), sketch(effect)
                else:
                    row[spec.name] = _checked(metric(images, reference), layer, spec, group), None
            found = {layer.name: row}
            if workspace is not None:
                workspace.save(part, _pack(found))
        errors.update(found)
    return [_choices(layer, specs, errors[layer.name], scoring) for layer, specs in offered]


def _error(
    replay: Replay, layer: LayerPlan, spec: LayerSpec, tensors: Tensors, scoring: Scoring
) -> tuple[float, Tensor | None]:
    group = scoring.group_of(layer.name)
    originals = attach_settled(replay.model, {layer.name: spec}, {layer.name: tensors})
    try:
        error, effect = scoring.score(group, list(replay.outputs()))
    finally:
        detach(replay.model, originals)
    return _checked(error, layer, spec, group), effect


def _checked(error: float, layer: LayerPlan, spec: LayerSpec, group: str) -> float:
    if not (math.isfinite(error) and error >= 0):
        raise InputError(
            f"layer {layer.name} as {spec.name}: the metric of group '{group}' gave {error}; "
            "expected a finite number from 0, larger for worse"
        )
    return error


def _choices(layer: LayerPlan, specs: Sequence[LayerSpec], scores: Scores, scoring: Scoring) -> LayerCandidates:
    candidates = tuple(
        Candidate(s.name, layer_bytes(layer.n, layer.k, s), scores[s.name][0], effect=scores[s.name][1]) for s in specs
    )
    tie = scoring.tie(layer.name) if scoring.tie is not None else ""
    return LayerCandidates(layer.name, layer.n * layer.k, candidates, scoring.group_of(layer.name), tie)


def _pack(found: Mapping[str, Scores]) -> dict[str, Tensor]:
    parts = {}
    for layer, scores in found.items():
        for spec, (error, effect) in scores.items():
            parts[f"{layer}|{spec}"] = torch.tensor([error], dtype=torch.float64)
            if effect is not None:
                parts[f"{layer}|{spec}|effect"] = effect
    return parts


def _restore(rows: Offers, workspace: Workspace | None, part: str) -> dict[str, Scores] | None:
    """What a finished part holds for these layers and candidates; None when it is not there, or lacks some."""
    if workspace is None or not rows or not workspace.has(part):
        return {} if not rows else None
    kept = workspace.load(part)
    if any(f"{layer.name}|{s.name}" not in kept for layer, specs in rows for s in specs):
        return None

    def score(key: str) -> tuple[float, Tensor | None]:
        return float(kept[key]), kept.get(f"{key}|effect")

    return {layer.name: {s.name: score(f"{layer.name}|{s.name}") for s in specs} for layer, specs in rows}
