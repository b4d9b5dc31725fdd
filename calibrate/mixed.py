"""Mixed precision under a budget: measure what every candidate costs, then choose one for each layer.

The plan is stored in the artifact as `plans["bits"]`; at run time it is nothing but each layer's own spec.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluate.offload import open_sampler
from ..evaluate.sampling import Sampler
from ..evaluate.workload import Workload
from ..quantize.allocate import Budget, LayerCandidates, greedy
from ..quantize.bit_plan import BitPlan
from ..quantize.errors import InputError
from ..quantize.format import Tensors
from ..quantize.recipe import CORE_ROLES
from ..quantize.spec import HadamardSpec, LayerSpec
from ..quantize.stats import LayerStats
from ..runtime.source import Source
from ..runtime.step import StepTracker
from . import statistics
from .compress import compress_layer, read_layer
from .drift import Drift, drift_of, end_of
from .plan import LayerPlan, Plan
from .probe import Call, capture, probe_steps
from .progress import Progress
from .sensitivity import Offers, Scoring, measure, measure_samples, offers, tie_qkv, unmeasured
from .timing import Timer, gpu_timer, timed
from .trial import plans_of, trial_samples, try_plans
from .workspace import Workspace

CANDIDATES = ("wvq2", "wvq3", "w4g64", "w6g64", "w8")
"""Codebooks below 4 bits: they lose a fifth to a half of what groups of integers of a little more bytes do."""
ROTATION = 64  # block of the Hadamard rotation of modulation layers
PROBE_SAMPLES = 8


@dataclass(frozen=True)
class Sizing:
    """A budget that can be met. costs: every offered layer's candidates with bytes and, for a time, milliseconds."""

    budget: Budget
    sensitivity: str
    offered: Offers
    costs: Sequence[LayerCandidates]
    offload: bool = False


def prepare(
    plan: Plan, budget: str, sensitivity: str, device: torch.device, offload: bool = False, timer: Timer | None = None
) -> Sizing:
    """What is known before anything is measured on the model.

    sensitivity  drift: teacher-forced, cheap; samples: a sampling run of 8 samples for each (layer, candidate)
    timer        for a budget in milliseconds; None: the GPU's
    Raises InputError for a budget that cannot be met, naming the smallest that can, or a time without a GPU.
    """
    parsed = Budget.parse(budget)
    offered = [pair for layer in plan.compressed for pair in offers([layer], candidates(layer))]
    costs = unmeasured(offered, Scoring(tie=tie_qkv))
    if parsed.unit == "ms":
        timer = timer or gpu_timer(device, parsed.text)
        costs = timed(costs, {layer.name: layer for layer in plan.compressed}, timer)
    greedy(costs, parsed)
    return Sizing(parsed, sensitivity, offered, costs, offload)


def prepare_untimed(
    plan: Plan, budget: str, sensitivity: str, device: torch.device, offload: bool = False
) -> Sizing | None:
    """`prepare` without running anything. None for a budget in milliseconds, of which only the GPU is looked for."""
    parsed = Budget.parse(budget)
    if parsed.unit != "ms":
        return prepare(plan, budget, sensitivity, device, offload)
    gpu_timer(device, parsed.text)
    return None


def allocate_bits(
    source: Source, plan: Plan, sizing: Sizing, workload: Workload, workspace: Workspace, progress: Progress,
    device: torch.device,
) -> tuple[Plan, BitPlan]:  # fmt: skip
    """The plan with every compressed layer's spec chosen among its candidates so that the measured errors are least
    under the budget, and the record of that choice. Plans that weigh what layers do together differently are tried on
    samples of their own."""
    compressor = _Compressor(source, plan, workspace, device)
    probe = dataclasses.replace(workload, samples=PROBE_SAMPLES, seed=workload.seed + 1)
    scoring = Scoring(tie=tie_qkv)
    # float32: the noise of a 16-bit run would hide what 8-bit layers cost
    with open_sampler(source, torch.float32, device, sizing.offload) as (sampler, _):
        if sizing.sensitivity == "samples":
            table = measure_samples(sampler, probe, sizing.offered, compressor, scoring, workspace, progress)
        else:
            model, family = sampler.denoiser, sampler.family
            with StepTracker(model, family) as tracker:
                calls = capture(model, family, lambda: sampler.run(probe, decode=False), probe_steps(workload.steps))
            guidance = sampler.guidance(probe, sampler.conditions(probe))
            drift = _drift(sampler, calls, tracker.timestep, 1.0 if guidance is None else guidance)
            scoring = dataclasses.replace(scoring, drift=drift)
            table = measure(model, family, calls, sizing.offered, compressor, scoring, workspace, progress)
        plans = plans_of(with_times(table, sizing.costs), sizing.budget)
        trial = dataclasses.replace(workload, samples=trial_samples(device), seed=workload.seed + 2)
        bits, _ = try_plans(sampler, trial, plans, [layer for layer, _ in sizing.offered], compressor, progress)
    layers = tuple(
        dataclasses.replace(layer, spec=bits.spec_of(layer.name)) if layer.name in bits.layers else layer
        for layer in plan.layers
    )
    return dataclasses.replace(plan, layers=layers), bits


def _drift(sampler: Sampler, calls: Sequence[Call], last: float | None, guidance: float) -> Drift:
    """The drift for the probe's calls after a run whose last call of the denoiser was at timestep `last`."""
    steps = [float(t) for call in calls if call.timesteps is not None for t in call.timesteps]
    schedule = (float(t) * sampler.family.timestep_scale for t in sampler.scheduler.timesteps)
    end = None if last is None else end_of(schedule, min([last, *steps]))
    return drift_of(sampler.scheduler, steps, guidance, end)


def settled_bits(bits: BitPlan, plan: Plan) -> BitPlan:
    """The bit plan of the same layers as `plan` has them, whose specs are settled."""
    layers = [layer for layer in plan.compressed if layer.name in bits.layers]
    size, weights = sum(layer.bytes_after for layer in layers), sum(layer.n * layer.k for layer in layers)
    specs = {layer.name: layer.spec.name for layer in layers if layer.spec is not None}
    return dataclasses.replace(bits, layers=specs, bytes=size, bits=8 * size / weights)


def with_times(table: Sequence[LayerCandidates], costs: Sequence[LayerCandidates]) -> list[LayerCandidates]:
    """The table with the milliseconds of `costs`, which lists the same layers and candidates."""
    times = {(row.layer, candidate.spec): candidate.ms for row in costs for candidate in row.candidates}
    return [
        dataclasses.replace(
            row, candidates=tuple(dataclasses.replace(c, ms=times[row.layer, c.spec]) for c in row.candidates)
        )
        for row in table
    ]


def candidates(layer: LayerPlan) -> list[LayerSpec]:
    """The specs a layer may get: its own with another weight format.

    Modulation layers that are rounded with GPTQ may be rotated too: their channels are of very different size and share
    a scale, which gains from that or loses by it, as the format may be.
    """
    spec, is_core = layer.spec, layer.role in CORE_ROLES
    assert spec is not None
    ways = [spec]
    if not is_core and spec.hadamard is None and "gram" in layer.needs() and layer.k % ROTATION == 0:
        ways.append(dataclasses.replace(spec, hadamard=HadamardSpec(ROTATION, "sylvester")))
    return [dataclasses.replace(way, weight=LayerSpec.parse(name).weight) for way in ways for name in CANDIDATES]


class _Compressor:
    """Compresses one layer in one spec from the stored statistics, holding those of one block at a time."""

    def __init__(self, source: Source, plan: Plan, workspace: Workspace, device: torch.device) -> None:
        self.source, self.workspace, self.device = source, workspace, device
        self.number = {layer.name: i for i, (_, layers) in enumerate(plan.units()) for layer in layers}
        self.held = -1
        self.stats: dict[str, LayerStats] = {}

    def __call__(self, layer: LayerPlan, spec: LayerSpec) -> Tensors:
        number = self.number[layer.name]
        if number != self.held:
            self.stats, self.held = statistics.load(self.workspace, number, self.device), number
        weight = read_layer(layer.name, self.source.checkpoint, self.device)
        return compress_layer(dataclasses.replace(layer, spec=spec), weight, self.stats.get(layer.name))


def require_disk_source(source: Any) -> Source:
    """Raises InputError for a model object: a budget needs the model's own sampler."""
    if not isinstance(source, Source):
        raise InputError("a budget needs the model's sampler; name a model folder instead of a model object")
    return source
