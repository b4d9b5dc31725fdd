"""Mixed precision under a budget: measure what every candidate costs, then choose one for each layer.

The plan is stored in the artifact as `plans["bits"]`; at run time it is nothing but each layer's own spec.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..evaluate.sampling import Sampler, Workload, make_sampler
from ..quantize.allocate import Budget, LayerCandidates, allocate
from ..quantize.bit_plan import BitPlan
from ..quantize.errors import InputError, unknown
from ..quantize.format import Tensors
from ..quantize.layer import layer_layout
from ..quantize.recipe import CORE_ROLES
from ..quantize.spec import LayerSpec
from ..quantize.stats import LayerStats
from ..runtime.linear import CompressedLinear
from ..runtime.source import Source
from . import statistics
from .compress import compress_layer, read_layer
from .drift import drift_of
from .plan import LayerPlan, Plan
from .probe import capture, probe_steps
from .progress import Progress
from .sensitivity import Scoring, measure, measure_samples, offers, tie_qkv
from .workspace import Workspace

CANDIDATES = ("w2g64", "w3g64", "w4g64", "w6g64", "w8")
MODULATION = ("w4g64", "w8")  # 2 and 3 bits ruin a modulation layer before they save anything
SENSITIVITIES = ("drift", "samples")
PROBE_SAMPLES = 8
_TIMED_ROWS = 4096


def allocate_bits(
    source: Source, plan: Plan, budget: str, sensitivity: str, workload: Workload, workspace: Workspace,
    progress: Progress, device: torch.device,
) -> tuple[Plan, BitPlan]:  # fmt: skip
    """The plan with every compressed layer's spec chosen among `CANDIDATES` (`MODULATION` for modulation layers) so
    that the measured errors are least under `budget`, and the record of that choice.

    sensitivity  drift: teacher-forced, cheap; samples: a sampling run of 8 samples for each (layer, candidate)
    Raises InputError for a budget that cannot be met, naming the smallest that can.
    """
    parsed = Budget.parse(budget)
    if sensitivity not in SENSITIVITIES:
        raise unknown("sensitivity", sensitivity, SENSITIVITIES)
    # float32: the noise of a 16-bit run would hide what 8-bit layers cost
    sampler = make_sampler(source, torch.float32, device)
    offered = [pair for layer in plan.compressed for pair in offers([layer], candidates(layer))]
    compressor = _Compressor(source, plan, workspace, device)
    probe = dataclasses.replace(workload, samples=PROBE_SAMPLES, seed=workload.seed + 1)
    scoring = Scoring(tie=tie_qkv)
    if sensitivity == "samples":
        table = measure_samples(sampler, probe, offered, compressor, scoring, workspace, progress)
    else:
        model, family = sampler.denoiser, sampler.family
        calls = capture(model, family, lambda: sampler.run(probe), probe_steps(workload.steps))
        steps = [float(t) for call in calls if call.timesteps is not None for t in call.timesteps]
        scoring = dataclasses.replace(scoring, drift=drift_of(sampler.scheduler, steps, guidance_of(sampler, workload)))
        table = measure(model, family, calls, offered, compressor, scoring, workspace, progress)
    if parsed.unit == "ms":
        table = timed(table, {layer.name: layer for layer in plan.compressed}, device)
    bits = allocate(table, parsed)
    layers = tuple(
        dataclasses.replace(layer, spec=bits.spec_of(layer.name)) if layer.name in bits.layers else layer
        for layer in plan.layers
    )
    return dataclasses.replace(plan, layers=layers), bits


def candidates(layer: LayerPlan) -> list[LayerSpec]:
    """The specs a layer may get: its own with another weight format."""
    assert layer.spec is not None
    names = CANDIDATES if layer.role in CORE_ROLES else MODULATION
    return [dataclasses.replace(layer.spec, weight=LayerSpec.parse(name).weight) for name in names]


def guidance_of(sampler: Sampler, workload: Workload) -> float:
    """The guidance scale a workload is sampled with: its own, or the default of the pipeline or the sampler."""
    if workload.guidance_scale is not None:
        return workload.guidance_scale
    pipe: Any = getattr(sampler, "pipe", None)
    if pipe is None:
        return float(getattr(sampler, "default_guidance", 1.0))
    parameter = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    return 1.0 if parameter is None or parameter.default is None else float(parameter.default)


def timed(
    table: Sequence[LayerCandidates], layers: dict[str, LayerPlan], device: torch.device
) -> list[LayerCandidates]:
    """The table with milliseconds a call, measured on `device`: median of 20 runs on 4,096 rows (modulation: 2)."""
    found: dict[tuple[int, int, str], float] = {}
    out = []
    for row in table:
        layer = layers[row.layer]
        rows = _TIMED_ROWS if layer.role in CORE_ROLES else 2
        times = []
        for candidate in row.candidates:
            key = (layer.n, layer.k, candidate.spec)
            if key not in found:
                found[key] = _milliseconds(layer.n, layer.k, LayerSpec.parse(candidate.spec), rows, device)
            times.append(dataclasses.replace(candidate, ms=found[key]))
        out.append(dataclasses.replace(row, candidates=tuple(times)))
    return out


def _milliseconds(n: int, k: int, spec: LayerSpec, rows: int, device: torch.device) -> float:
    layer = CompressedLinear(k, n, spec, bias=False, device=device)
    zeros = {name: torch.zeros(t.shape, dtype=t.dtype, device=device) for name, t in layer_layout(n, k, spec).items()}
    layer.load_tensors(zeros)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, spans = torch.zeros(rows, k, device=device, dtype=dtype), []
    for _ in range(23):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        layer(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spans.append(time.perf_counter() - start)
    return 1e3 * sorted(spans[3:])[10]


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
