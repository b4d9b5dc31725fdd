"""A compressed or pruned model against full precision, sample by sample on the same conditions and noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quantize.errors import InputError
from ..runtime.load import pick_device, pick_dtype
from ..runtime.source import find_source
from .metrics import mean_psnr, relative_error, ssim
from .pairing import check_pair, same_conditions
from .picture import save_pairs
from .sampling import Sampler, Samples, Workload, make_sampler

Progress = Callable[[str, int, int], None]
PICTURED = 8


@dataclass(frozen=True)
class SeedResult:
    """Paired metrics of one seed's samples. psnr: mean over samples, dB; step_error: relative RMS error of the
    denoiser's input latents at each step."""

    seed: int
    psnr: float
    ssim: float
    latent_error: float
    step_error: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """What a compressed or pruned model cost against full precision; `artifact` names it whichever it is."""

    artifact: str
    baseline: str
    workload: dict[str, Any]
    sampler: str
    device: str
    dtype: str
    seeds: tuple[SeedResult, ...]
    bytes_artifact: int
    bytes_baseline: int
    seconds_artifact: float
    seconds_baseline: float
    picture: str | None = field(default=None)

    @property
    def psnr(self) -> float:
        return statistics.fmean(s.psnr for s in self.seeds)

    @property
    def psnr_spread(self) -> float:
        """Sample standard deviation over seeds; 0 for a single seed."""
        return statistics.stdev(s.psnr for s in self.seeds) if len(self.seeds) > 1 else 0.0

    @property
    def ssim(self) -> float:
        return statistics.fmean(s.ssim for s in self.seeds)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "psnr": self.psnr, "psnr_spread": self.psnr_spread, "ssim": self.ssim}


@dataclass(frozen=True)
class Run:
    """What one model sampled, seed by seed: one side of a comparison, and good for several."""

    model: str
    workload: Workload
    seeds: tuple[int, ...]
    samples: tuple[Samples, ...]
    sampler: str
    device: str
    dtype: str
    bytes: int
    seconds: float


def compare(
    artifact: str | Path,
    baseline: str | Path,
    workload: Workload | None = None,
    seeds: tuple[int, ...] = (1, 2),
    device: str | None = None,
    picture: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Samples both models on the same conditions and noise and measures how far apart they end up.

    workload  what to sample, once for each of `seeds`
    picture   where to save the side-by-side picture (PNG)
    Raises InputError when either is unusable, or the two do not turn the same noise and conditions into samples.
    """
    workload = workload or Workload(samples=20)
    check_pair(artifact, baseline)
    reference = sample_seeds(baseline, workload, seeds, device, "baseline", progress)
    return compare_runs(sample_seeds(artifact, workload, seeds, device, "artifact", progress), reference, picture)


def sample_seeds(
    model: str | Path,
    workload: Workload,
    seeds: tuple[int, ...],
    device: str | None = None,
    role: str = "samples",
    progress: Progress | None = None,
) -> Run:
    """Samples the workload once for each seed, keeping every step's latents. `role` names it to `progress`."""
    place = pick_device(device)
    dtype = pick_dtype(workload.dtype, place)
    sampler = make_sampler(find_source(model), dtype, place)
    start = time.perf_counter()
    samples = tuple(_run(sampler, workload, seed, role, progress) for seed in seeds)
    return Run(
        model=str(model),
        workload=workload,
        seeds=seeds,
        samples=samples,
        sampler=scheduler_name(sampler),
        device=str(place),
        dtype=str(dtype).removeprefix("torch."),
        bytes=tensor_bytes(sampler.denoiser),
        seconds=time.perf_counter() - start,
    )


def compare_runs(artifact: Run, baseline: Run, picture: Path | None = None) -> Comparison:
    """Paired metrics of two runs of the same workload and seeds."""
    pairs = zip(baseline.seeds, artifact.samples, baseline.samples, strict=True)
    results = tuple(measure(seed, got, want) for seed, got, want in pairs)
    if picture is not None:
        save_pairs(picture, baseline.samples[0].images[:PICTURED], artifact.samples[0].images[:PICTURED])
    return Comparison(
        artifact=artifact.model,
        baseline=baseline.model,
        workload={key: value for key, value in baseline.workload.to_dict().items() if key != "seed"},
        sampler=baseline.sampler,
        device=baseline.device,
        dtype=baseline.dtype,
        seeds=results,
        bytes_artifact=artifact.bytes,
        bytes_baseline=baseline.bytes,
        seconds_artifact=artifact.seconds,
        seconds_baseline=baseline.seconds,
        picture=None if picture is None else str(picture),
    )


def measure(seed: int, got: Samples, want: Samples) -> SeedResult:
    """Paired metrics of one seed. Raises InputError when the smaller model produced NaN or infinity, or the two were
    asked for different samples."""
    if not same_conditions(got.conditions, want.conditions):
        raise InputError(f"seed {seed}: the two models drew different conditions; give both --conditions FILE")
    if not torch.isfinite(got.images).all():
        bad = int((~torch.isfinite(got.images)).flatten(1).any(1).sum())
        raise InputError(f"seed {seed}: {bad} of {len(got.images)} samples of the smaller model hold NaN or infinity")
    steps = tuple(relative_error(a, b) for a, b in zip(got.trajectory, want.trajectory, strict=True))
    images = got.images.dim() >= 4 and bool((want.images.min() >= 0) & (want.images.max() <= 1))
    span = 1.0 if images else float(want.images.max() - want.images.min())
    return SeedResult(
        seed=seed,
        psnr=mean_psnr(got.images, want.images, span),
        ssim=ssim(got.images, want.images) if images else float("nan"),
        latent_error=relative_error(got.images, want.images),
        step_error=steps,
    )


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of every parameter and buffer as the artifact stores them (16 bits for what is not compressed)."""
    total = 0
    for name, tensor in model.state_dict().items():
        owner = model.get_submodule(name.rpartition(".")[0])
        stored = getattr(owner, "spec", None) is not None and name.rpartition(".")[2] in owner._buffers
        total += tensor.numel() * (tensor.element_size() if stored else 2)
    return total


def scheduler_name(sampler: Sampler) -> str:
    return type(sampler.scheduler).__name__


def _run(sampler: Sampler, workload: Workload, seed: int, role: str, progress: Progress | None) -> Samples:
    seeded = Workload(**{**asdict(workload), "seed": seed})
    label = f"{role}, seed {seed}"
    report = None if progress is None else lambda done, total: progress(label, done, total)
    return sampler.run(seeded, report, keep_trajectory=True)
