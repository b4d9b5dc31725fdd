"""A compressed or pruned model against full precision, sample by sample on the same conditions and noise."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quantize.errors import InputError, OutputError
from ..runtime.artifact import DTYPES, is_artifact
from ..runtime.load import pick_device, pick_dtype
from ..runtime.source import Source, find_source
from ..runtime.writer import write_json
from .metrics import error_of, sample_psnr, square_sums, ssim
from .offload import open_sampler
from .output import check_writable, writing
from .pairing import check_pair, digest_conditions, same_component
from .picture import save_pairs
from .sample_parts import SeedSamples, keep_parts, part_folder
from .sampling import Sampler
from .workload import Workload, check_seed

Progress = Callable[[str, int, int], None]
PICTURED = 8


@dataclass(frozen=True)
class SeedResult:
    """Paired metrics of one seed's samples. psnr: mean over samples, dB; ssim: NaN for latents; step_error: relative
    RMS error of the denoiser's input latents at each step."""

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
        """Plain JSON; None for what is not a number."""
        found = {**asdict(self), "psnr": self.psnr, "psnr_spread": self.psnr_spread, "ssim": self.ssim}
        plain: dict[str, Any] = _without_nan(found)
        return plain


class Unsaved(OutputError):
    """A comparison that is done and could not be written: `result` holds it."""

    def __init__(self, message: str, result: Comparison) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Run:
    """What one model sampled, seed by seed: one side of a comparison, and good for several."""

    model: str
    workload: Workload
    seeds: tuple[int, ...]
    samples: tuple[SeedSamples, ...]
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
    record: Path | None = None,
) -> Comparison:
    """Samples both models on the same conditions and noise and measures how far apart they end up.

    workload  what to sample, once for each of `seeds`, which must differ
    picture   where to save the side-by-side picture (PNG)
    record    where to save the result (JSON)
    Memory holds a few batches at a time: until the end the samples lie in a temporary folder beside record or picture.
    Raises InputError when either is unusable, or the two do not turn the same noise and conditions into samples;
    OutputError, before anything is sampled where that can be told, when picture or record cannot be written: where it
    could not be told, `Unsaved`, with the result.
    """
    workload = workload or Workload(samples=20)
    _check_seeds(seeds)
    check_pair(artifact, baseline)
    for path in filter(None, (record, picture)):
        check_writable(path)
    component = same_component(find_source(artifact), baseline)
    with part_folder(record or picture) as folder:
        # the quicker one first, of which less is known: a file of it that is wrong is met before the long part
        run = sample_seeds(artifact, workload, seeds, device, "artifact", progress, baseline, folder)
        reference = sample_seeds(
            find_source(baseline, component), workload, seeds, device, "baseline", progress, None, folder
        )
        result = compare_runs(run, replace(reference, model=str(baseline)))
        result = replace(result, picture=None if picture is None else str(picture))
        try:
            if record is not None:
                with writing(record) as path:
                    write_json(path, result.to_dict())
            if picture is not None:
                with writing(picture) as path:
                    save_pairs(path, *(side.samples[0].first_images(PICTURED) for side in (reference, run)))
        except OutputError as error:
            raise Unsaved(str(error), result) from error
    return result


def sample_seeds(
    model: str | Path | Source,
    workload: Workload,
    seeds: tuple[int, ...],
    device: str | None = None,
    role: str = "samples",
    progress: Progress | None = None,
    substitute: str | Path | None = None,
    folder: Path | None = None,
) -> Run:
    """Samples the workload once for each seed, keeping every step's latents.

    role        names it to `progress`
    substitute  the model whose scheduler is used for a bare transformer without one
    folder      where the samples are kept, which is then needed as long as the run; None: all of them in memory
    Raises InputError when the model is unusable.
    """
    place = pick_device(device)
    dtype = pick_dtype(workload.dtype, place)
    other = None if substitute is None else find_source(substitute)
    source = model if isinstance(model, Source) else find_source(model)
    offload = workload.offload and not is_artifact(source.transformer)
    if progress is not None:
        progress(f"loading the {role}", 0, 1)
    with open_sampler(source, dtype, place, offload, other) as (sampler, _):
        start = time.perf_counter()
        samples = tuple(_run(sampler, replace(workload, seed=seed), role, progress, folder) for seed in seeds)
        return Run(
            model=source.label if isinstance(model, Source) else str(model),
            workload=replace(workload, guidance_scale=samples[0].guidance),
            seeds=seeds,
            samples=samples,
            sampler=scheduler_name(sampler),
            device=str(place),
            dtype=str(dtype).removeprefix("torch."),
            bytes=stored_bytes(source, sampler.denoiser),
            seconds=time.perf_counter() - start,
        )


def compare_runs(artifact: Run, baseline: Run) -> Comparison:
    """Paired metrics of two runs of the same workload and seeds. Raises InputError for samples with NaN or infinity."""
    _check_finite(baseline, "baseline")  # first: those of the other may come from what both have in common
    _check_finite(artifact, "artifact")
    pairs = zip(baseline.seeds, artifact.samples, baseline.samples, strict=True)
    results = tuple(measure(seed, got, want) for seed, got, want in pairs)
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
    )


def measure(seed: int, got: SeedSamples, want: SeedSamples) -> SeedResult:
    """Paired metrics of one seed, of finite samples. Raises InputError when the two were asked for different ones."""
    if got.conditions != want.conditions:
        raise InputError(f"seed {seed}: the two models drew different conditions; give both --conditions FILE")
    shapes, ranges = zip(*((part.images.shape, part.images.aminmax()) for part in want), strict=True)
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    images = len(shapes[0]) >= 4 and bool((low >= 0) & (high <= 1))
    span = 1.0 if images else float(high - low)
    decibels, similarities, sums = [], [], []
    for a, b in zip(got, want, strict=True):
        decibels.append(sample_psnr(a.images, b.images, span))
        if images:
            similarities.append(ssim(a.images, b.images))
        pairs = zip((a.images, *a.trajectory), (b.images, *b.trajectory), strict=True)
        sums.append(torch.stack([square_sums(*pair) for pair in pairs]))
    latent_error, *step_error = map(error_of, torch.stack(sums).sum(0))
    return SeedResult(
        seed=seed,
        psnr=float(torch.cat(decibels).mean()),
        ssim=float(torch.cat(similarities).mean()) if images else float("nan"),
        latent_error=latent_error,
        step_error=tuple(step_error),
    )


def stored_bytes(source: Source, denoiser: nn.Module) -> int:
    """Bytes of every tensor of a denoiser: those of an artifact as its files hold them; those of a full-precision model
    at 16 bits, since a checkpoint in float32 would make whatever is compared with it look small."""
    if not is_artifact(source.transformer):
        return tensor_bytes(denoiser)
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for shape, dtype in source.checkpoint.headers.values())


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of every parameter and buffer of a loaded model, at 16 bits for what is not compressed."""
    total = 0
    for name, tensor in model.state_dict().items():
        owner = model.get_submodule(name.rpartition(".")[0])
        stored = getattr(owner, "spec", None) is not None and name.rpartition(".")[2] in owner._buffers
        total += tensor.numel() * (tensor.element_size() if stored else 2)
    return total


def scheduler_name(sampler: Sampler) -> str:
    return type(sampler.scheduler).__name__


@torch.no_grad()
def _run(
    sampler: Sampler, workload: Workload, role: str, progress: Progress | None, folder: Path | None
) -> SeedSamples:
    label = f"{role}, seed {workload.seed}"
    report = None if progress is None else lambda done, total: progress(label, done, total)
    conditions = sampler.conditions(workload)
    batches = sampler.run_batches(workload, conditions, report, keep_trajectory=True)
    parts = keep_parts(batches, folder)
    return SeedSamples(parts, digest_conditions(conditions), sampler.guidance(workload, conditions))


def _check_finite(run: Run, role: str) -> None:
    for seed, samples in zip(run.seeds, run.samples, strict=True):
        broken = torch.cat([~torch.isfinite(part.images).flatten(1).all(1) for part in samples])
        if broken.any():
            where = f"{run.model} ({role}), seed {seed}"
            raise InputError(f"{where}: {int(broken.sum())} of {len(broken)} samples hold NaN or infinity")


def _check_seeds(seeds: tuple[int, ...]) -> None:
    """A seed that counts twice would narrow the spread without telling anything new."""
    for seed in seeds:
        check_seed(seed)
    if not seeds or len(set(seeds)) < len(seeds):
        found = ", ".join(map(str, seeds)) or "none"
        raise InputError(f"--seed: expected one seed or more, each of them once, found {found}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
