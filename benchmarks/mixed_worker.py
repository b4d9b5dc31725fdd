"""What a process of `mixed_precision.py` measures: sensitivities of layers, and whole plans."""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vdit_quant.calibrate.compress import compress_layer
from vdit_quant.calibrate.drift import drift_of
from vdit_quant.calibrate.plan import LayerPlan
from vdit_quant.calibrate.probe import Call, capture, probe_steps
from vdit_quant.calibrate.record import Recorder
from vdit_quant.calibrate.sensitivity import Scoring, measure, measure_samples, offers, relative_error, tie_qkv
from vdit_quant.calibrate.trial import trial_samples
from vdit_quant.evaluate.metrics import sample_psnr
from vdit_quant.evaluate.sampling import Sampler, Workload, make_sampler
from vdit_quant.quantize.allocate import LayerCandidates
from vdit_quant.quantize.format import Tensors
from vdit_quant.quantize.method import FloatLayer, resolve_method
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.quantize.stats import LayerStats
from vdit_quant.runtime.attach import attach_settled, detach, linear_layers
from vdit_quant.runtime.demo import demo_path
from vdit_quant.runtime.family import block_of
from vdit_quant.runtime.load import linear_shapes, pick_device
from vdit_quant.runtime.source import find_source

CORE = ("attention", "feed_forward")
CALIBRATION_SEED = 1_000_000  # no seed that is compared on
_worker: list[Worker] = []


@dataclass
class Measured:
    """What a plan gave: PSNR over the seeds, of every sample that plans are chosen by, and its error on the probe."""

    psnr: float
    trial: list[float]
    probe_error: float
    by_seed: list[float] = field(default_factory=list)


def start(options: argparse.Namespace, devices: Any) -> None:
    """The initializer of a process."""
    torch.set_num_threads(options.threads)
    _worker.append(Worker(options, devices.get()))


def score(numbers: list[int]) -> tuple[list[LayerCandidates], float]:
    """Rows of the table, with effects as arrays, which cross processes without open files; and the seconds it took."""
    begin = time.perf_counter()
    rows = _worker[0].score(numbers)
    return [_with(row, lambda t: t.numpy()) for row in rows], time.perf_counter() - begin


def unpacked(rows: list[LayerCandidates]) -> list[LayerCandidates]:
    return [_with(row, torch.from_numpy) for row in rows]


def measure_plan(layers: dict[str, str]) -> Measured:
    return _worker[0].measure(layers)


def _with(row: LayerCandidates, change: Any) -> LayerCandidates:
    made = (replace(c, effect=None if c.effect is None else change(c.effect)) for c in row.candidates)
    return replace(row, candidates=tuple(made))


class Model:
    """The model and what its layers are offered; no statistics yet."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        self.options, self.device = options, pick_device(device)
        source = find_source(demo_path() if options.model == "demo" else options.model)
        self.label = "demo" if options.model == "demo" else source.label.rstrip("/").rsplit("/", 1)[-1]
        self.sampler: Sampler = make_sampler(source, torch.float32, self.device)
        self.model, self.family = self.sampler.denoiser, self.sampler.family
        self.blocks, self.roles = self.family.block_names(self.model), self.family.linears(self.model)
        self.shapes = linear_shapes(self.model)
        self.offered = self._offered()

    def workload(self, seed: int, samples: int | None = None) -> Workload:
        o = self.options
        return Workload(samples or o.samples, o.steps, seed, o.guidance, o.batch_size)

    def _offered(self) -> list[tuple[LayerPlan, list[LayerSpec]]]:
        """Every core and modulation layer with its candidates, completed by the method, in the model's order."""
        out = []
        for name, role in self.roles.items():
            o = self.options
            text = o.candidates if role in CORE else o.modulation if role == "modulation" else ""
            if not text:
                continue
            n, k = self.shapes[name]
            specs = [LayerSpec.parse(part) for part in text.split(",") if part]
            used = o.method if role in CORE else o.modulation_method
            method, defaults = resolve_method(used, {})
            # a folded scale changes two layers at once; alone, a layer keeps its own
            params = {"fold": False} if "fold" in defaults else {}
            if role in CORE:
                specs = [method.complete(spec, n, k, {**defaults, **params}) for spec in specs]
            out += offers([LayerPlan(name, role, n, k, block_of(name, self.blocks), specs[0], "", used, params)], specs)
        return out


class Worker(Model):
    def __init__(self, options: argparse.Namespace, device: str) -> None:
        super().__init__(options, device)
        self.weights = {name: m.weight.detach().float() for name, m in linear_layers(self.model).items()}
        self.stats, self.calls = self._calibrate()
        self.references: dict[int, torch.Tensor] = {}

    def _calibrate(self) -> tuple[dict[str, LayerStats], list[Call]]:
        """Statistics of every layer and the probe's calls, each from a sampling run of its own."""
        o, work, stats = self.options, self.workload(CALIBRATION_SEED, self.options.calibration_samples), {}
        wanted = {layer.name: layer.needs() for layer, _ in self.offered if layer.needs()}
        if wanted:
            with Recorder(self.model, self.family, wanted, o.steps) as recorder:
                self.sampler.run(work)
            stats = recorder.result()
        probe = replace(work, samples=o.probe_samples, seed=CALIBRATION_SEED + 1)
        steps = probe_steps(o.steps, o.probe_steps)
        return stats, capture(self.model, self.family, lambda: self.sampler.run(probe), steps)

    def score(self, numbers: list[int]) -> list[LayerCandidates]:
        o, some = self.options, [self.offered[i] for i in numbers]
        scoring = Scoring(tie=tie_qkv) if o.tie_qkv else Scoring()
        if o.sensitivity == "samples":
            probe = self.workload(CALIBRATION_SEED + 1, o.probe_samples)
            return measure_samples(self.sampler, probe, some, self.tensors_of, scoring)
        if o.sensitivity == "drift":
            steps = [float(t) for call in self.calls if call.timesteps is not None for t in call.timesteps]
            scoring = replace(scoring, drift=drift_of(self.sampler.scheduler, steps, o.guidance))
        return measure(self.model, self.family, self.calls, some, self.tensors_of, scoring)

    def tensors_of(self, layer: LayerPlan, spec: LayerSpec) -> Tensors:
        """Compressed once for all processes: a layer in a plan is the very layer that was measured."""
        name = hashlib.sha256(f"{layer.name}|{spec.name}".encode()).hexdigest()[:24]
        path = Path(self.options.folder) / f"{name}.safetensors"
        if not path.exists():
            floats = FloatLayer(layer.name, self.weights[layer.name])
            temporary = path.with_suffix(f".{os.getpid()}")
            save_file(compress_layer(replace(layer, spec=spec), floats, self.stats.get(layer.name)), temporary)
            temporary.replace(path)
        return load_file(path, device=str(self.device))

    @torch.no_grad()
    def measure(self, layers: dict[str, str]) -> Measured:
        trial = self.workload(CALIBRATION_SEED + 2, trial_samples(self.device))
        works = [*(self.workload(seed) for seed in self.options.seeds), trial]
        for work in works:
            if work.seed not in self.references:
                self.references[work.seed] = self.sampler.run(work).images
        full = [call.run(self.model) for call in self.calls]
        plans = {layer.name: layer for layer, _ in self.offered}
        specs = {name: LayerSpec.parse(spec) for name, spec in layers.items()}
        tensors = {name: self.tensors_of(plans[name], spec) for name, spec in specs.items()}
        originals = attach_settled(self.model, specs, tensors)
        try:
            rows = sum(map(len, full))
            error = sum(relative_error(c.run(self.model), r) * len(r) for c, r in zip(self.calls, full, strict=True))
            found = [sample_psnr(self.sampler.run(work).images, self.references[work.seed]) for work in works]
        finally:
            detach(self.model, originals)
        seeds = [float(psnr.mean()) for psnr in found[:-1]]
        return Measured(sum(seeds) / len(seeds), found[-1].tolist(), error / rows, seeds)
