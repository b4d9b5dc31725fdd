"""Training data out of nothing but the teacher: latents that its own sampler ends with, cached on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..calibrate.progress import Progress
from ..calibrate.workspace import readable
from ..evaluate.conditions import UNGUIDED
from ..evaluate.sampling import DenoiserSampler
from ..evaluate.workload import Workload
from ..quantize.errors import InputError, OutputError
from ..runtime.checkpoint import read_json
from .latents import LATENTS
from .team import Team

NOTE = "generated.json"
# training draws its noise and conditions from here on, so that no comparison's and no calibration's seed repeats them
TRAINING_SEEDS = 2_000_000


@dataclass(frozen=True)
class Generation:
    """How the teacher samples its training data: `samples` runs of `steps` steps with its own scheduler.

    guidance  1.0 samples the distribution the teacher was trained on; more gives what guided sampling looks like
    """

    samples: int = 4096
    steps: int = 25
    guidance: float = 1.0
    seed: int = 0
    batch_size: int = 1024
    conditions: str | None = None

    def workload(self) -> Workload:
        seed = TRAINING_SEEDS + self.seed
        return Workload(
            self.samples, self.steps, seed, self.guidance, self.batch_size, conditions=self.conditions, learn=True
        )


def generate_latents(
    teacher: nn.Module,
    scheduler: Any,
    settings: Generation,
    folder: Path,
    source: str,
    progress: Progress,
    team: Team | None = None,
) -> Path:
    """Fills `folder` with shards of `latents.py`, one a batch; shards that are there already are kept, so an
    interrupted run goes on. `source` is the teacher's fingerprint.

    Raises InputError when the folder holds something else or a damaged shard, or the family cannot draw conditions by
    itself.
    """
    job = {"teacher": source, **{k: v for k, v in asdict(settings).items() if k != "conditions"}}
    job["conditions"] = settings.workload().to_dict()["conditions"]
    team = team or Team()
    if team.is_main:
        _open(folder, job)
    team.wait()
    # a folder that is half full goes on in batches of its own size
    settings = replace(settings, batch_size=read_json(folder / NOTE)["batch_size"])
    sampler, workload = DenoiserSampler(teacher, scheduler), settings.workload()
    spans = list(sampler.batches(workload))
    missing = [(i, span) for i, span in enumerate(spans) if not _is_there(_shard(folder, i))]
    if not missing:
        team.wait()
        return folder
    mine = missing[team.rank :: team.world]
    progress.stage("sampling training data from the teacher", len(mine) * workload.steps)
    conditions = sampler.conditions(workload)
    unguided = conditions.unguided
    if settings.guidance == 1.0:  # the unguided branch would be multiplied by zero
        conditions = replace(conditions, unguided=None)
    for turn, (number, (start, stop)) in enumerate(mine):
        steps = _Steps(progress, turn * workload.steps, workload.steps, f"samples {start} to {stop}")
        with torch.no_grad(), steps.watching(teacher):
            latents = sampler.sample_batch(workload, conditions, start, stop).float().cpu()
        if not torch.isfinite(latents).all():
            raise InputError(f"the teacher sampled NaN or infinity in samples {start} to {stop}; nothing to learn from")
        shard = {LATENTS: latents, **{name: t[start:stop] for name, t in conditions.guided.items()}}
        if unguided is not None:
            shard.update({UNGUIDED + name: t[:1] for name, t in unguided.items()})
        _write(_shard(folder, number), shard)
    progress.advance(len(mine) * workload.steps)
    team.wait()
    return folder


@dataclass
class _Steps:
    """Reports the sampler steps of one batch as its teacher is called; `before`: those of earlier batches."""

    progress: Progress
    before: int
    steps: int
    detail: str
    calls: int = 0

    @contextmanager
    def watching(self, teacher: nn.Module) -> Iterator[None]:
        handle = teacher.register_forward_hook(self._report)
        try:
            yield
        finally:
            handle.remove()

    def _report(self, *_: Any) -> None:
        self.calls += 1  # a scheduler of second order makes more calls than steps
        self.progress.advance(self.before + min(self.calls, self.steps), self.detail)


def is_complete(folder: Path) -> bool:
    """Whether every shard of a generated folder is there."""
    note = folder / NOTE
    if not note.exists():
        return False
    job = read_json(note)
    return all(_shard(folder, i).exists() for i in range(-(-job["samples"] // job["batch_size"])))


def _open(folder: Path, job: dict[str, Any]) -> None:
    note = folder / NOTE
    if note.exists():
        held = read_json(note)
        changed = sorted(k for k in {*held, *job} - {"batch_size"} if held.get(k) != job.get(k))
        if changed:
            raise InputError(f"{folder}: holds latents of other settings ({', '.join(changed)}); name another folder")
        if any(folder.glob("*.safetensors")):
            return
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty, and not latents that a teacher sampled; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: could not be written ({error})") from error


def _shard(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def _is_there(shard: Path) -> bool:
    if not shard.exists():
        return False
    with readable(shard) as path, safe_open(path, "pt"):  # looks at the header and the size
        return True


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: could not be written ({error})") from error
