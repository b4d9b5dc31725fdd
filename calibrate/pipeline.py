"""The whole job on one page: a checkpoint in, a compressed artifact out."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..evaluate.sampling import load_scheduler, make_sampler
from ..evaluate.timesteps import latent_tokens, set_timesteps
from ..quantize.errors import InputError, OutputError
from ..quantize.recipe import Recipe
from ..runtime.artifact import DTYPES, is_artifact
from ..runtime.complete import check_complete
from ..runtime.demo import DEMO
from ..runtime.family import find_family
from ..runtime.lineage import short_record
from ..runtime.load import pick_device, pick_dtype
from ..runtime.pipeline_folder import check_pipeline
from ..runtime.schedule import plan_steps
from ..runtime.source import Source, find_source
from ..runtime.writer import name_output, preview_target
from . import statistics
from .assemble import block_part, check_kept, kept_names, write_artifact
from .block_tuning import BlockTuner
from .compress import compress_unit
from .mixed import Sizing, allocate_bits, prepare, prepare_untimed, require_disk_source, settled_bits
from .model_source import Data, ModelSource
from .options import Options, check_workload
from .plan import LayerPlan, Plan, check_formats, check_methods, check_used, make_plan, settle
from .progress import Progress
from .trained_blocks import needs_tuning, settle_training, untrained_notes
from .workspace import Workspace

TUNED_SAMPLES = 32
"""Samples whose calls blocks are trained on, at most: these calls are held in memory."""


def compress(
    model: str | Path | nn.Module | None = None,
    output: str | Path | None = None,
    data: Data | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Compresses `model` and writes the artifact; returns its folder.

    model    a pipeline folder, a transformer folder, a hub id, a model object, or None: the bundled demo checkpoint
    output   default: the model's name with the bits, in the current folder
    data     only for a model object: a callable that runs it, or an iterable of its call arguments. Methods that need
             no statistics run without
    options  the fields of `Options`

    Raises InputError, with nothing left half written, for anything in the input that cannot be used.
    """
    job, progress = plan_job(model, output, data, Options(**options)), progress or Progress()
    for note in job.notes:
        progress.note(note)
    return run_job(job, progress)


@dataclass(frozen=True)
class Job:
    """A calibration that is known to start.

    plans   decisions that act at run time, as the artifact will hold them
    sizing  of a budget that no candidate has to be timed for
    notes   what planning decided that its tables do not show
    """

    settings: Options
    source: Source | ModelSource
    recipe: Recipe
    target: Path
    plan: Plan
    plans: dict[str, Any]
    device: torch.device
    sizing: Sizing | None
    notes: tuple[str, ...] = ()


def plan_job(
    model: str | Path | nn.Module | None,
    output: str | Path | None,
    data: Data | None,
    settings: Options,
    preview: bool = False,
) -> Job:
    """What `compress` with these arguments will do. Reads names and shapes, no weights, and runs nothing.

    Raises InputError for everything that can be refused so early; in a preview, a wrong output is a note.
    """
    source, device = open_source(model, data, settings.component), pick_device(settings.device)
    recipe, notes = settle_training(source, settings.resolve_recipe(), settings, device)
    target = Path(output) if output is not None else default_output(source.label, recipe)
    disk = source if isinstance(source, Source) else None
    notes = (*notes, *preview_target(target, disk, settings.overwrite, preview))
    plan = plan_source(source, recipe)
    if settings.budget is None:  # which chooses the formats itself
        check_methods(plan)
    check_used(plan, settings.group_size, settings.full_steps, [text.partition("=")[0] for text in settings.params])
    if not settings.i_know:
        check_formats(plan)
    tuned = needs_tuning(plan)
    if tuned and settings.offload:
        raise InputError("--offload: the method trains whole blocks of the model, which must fit; use its steps=0")
    plans = run_time_plans(source, settings)
    pick_dtype(settings.dtype, device)
    settings.workload().to_dict()  # reads the files that it names
    sampled = tuned or settings.budget is not None or any(layer.needs() for layer in plan.compressed)
    if sampled and disk is not None:
        check_workload(disk, settings.workload())
    sizing = None
    if settings.budget is not None:
        require_disk_source(source)
        sizing = prepare_untimed(plan, settings.budget, settings.sensitivity, device, settings.offload)
    notes = (*notes, *untrained_notes(plan), *left_notes(source, target))
    return Job(settings, source, recipe, target, plan, plans, device, sizing, notes)


def run_job(job: Job, progress: Progress) -> Path:
    """Records, compresses and writes; returns the artifact's folder. Raises InputError as `compress` does."""
    settings, source, plan, device = job.settings, job.source, job.plan, job.device
    check_kept(source, plan)
    plans, sizing, bits = dict(job.plans), job.sizing, None
    if settings.budget is not None and sizing is None:
        sizing = prepare(plan, settings.budget, settings.sensitivity, device, settings.offload)
    workspace = Workspace(job.target)
    provenance = describe(source, job.recipe, settings)
    if line := workspace.open(provenance, settings.resume):
        progress.note(line)
    with workspace.kept():
        try:
            memory = statistics.default_memory(source, device) if settings.stats_gb is None else settings.stats_gb * 1e9
            statistics.gather(
                source, plan, settings.workload(), device, workspace, progress, memory, offload=settings.offload
            )
            if sizing is not None:
                disk, work = require_disk_source(source), settings.workload()
                plan, bits = allocate_bits(disk, plan, sizing, work, workspace, progress, device)
            compress_blocks(source, plan, settings, workspace, progress)
            plan = settle_plan(plan, workspace, progress)
            if bits is not None:
                plans["bits"] = settled_bits(bits, plan).to_dict()
        except OutputError:
            raise
        except InputError:  # the input must change first, and then nothing finished here is of use
            workspace.remove()
            raise
        write_artifact(source, plan, workspace, provenance, job.target, settings.overwrite, plans)
    workspace.remove()
    return job.target


def open_source(
    model: str | Path | nn.Module | None, data: Data | None = None, component: str | None = None
) -> Source | ModelSource:
    """The source behind what the user named. Raises InputError for an artifact that is already compressed."""
    if isinstance(model, nn.Module):
        return ModelSource(model, data)
    source = find_source(DEMO if model is None else model, component)
    if is_artifact(source.transformer):
        plain = [name for name in source.components if not is_artifact(source.root / name)]
        hint = f"--component {plain[0]} compresses its other denoiser" if plain else "calibrate the original checkpoint"
        raise InputError(f"{source.label}: already a compressed artifact; {hint}")
    return source


def left_notes(source: Source | ModelSource, target: Path) -> list[str]:
    """What a run does not say of itself: denoisers of the pipeline that stay as they are."""
    if isinstance(source, ModelSource):
        return []
    left = [n for n in source.components if n != source.component and not is_artifact(source.root / n)]
    return [
        f"{name}, another denoiser of this pipeline, stays as it is; compress it afterwards: "
        + shlex.join(["vdit-quant", "calibrate", str(target), "--component", name, "-o", f"{target}-2"])
        for name in left
    ]


def default_output(label: str, recipe: Recipe) -> Path:
    return name_output(label, recipe.name)


def plan_source(source: Source | ModelSource, recipe: Recipe) -> Plan:
    """The plan for a source, checked against its checkpoint. Reads names and shapes, no weights."""
    if isinstance(source, Source) and source.is_pipeline:
        check_pipeline(source.root, source.component)
    skeleton = source.skeleton()
    plan = make_plan(skeleton, find_family(skeleton), recipe)
    headers = source.checkpoint.headers
    check_complete(skeleton, headers, source.label, first=[f"{layer.name}.weight" for layer in plan.compressed])
    for name in kept_names(source, plan):
        if headers[name][1] not in DTYPES:
            raise InputError(
                f"{source.label}: {name} is of type {headers[name][1]}; expected one of {', '.join(DTYPES)}"
            )
    return plan


def run_time_plans(source: Source | ModelSource, settings: Options) -> dict[str, Any]:
    """The decisions that act at run time, by kind, as they are stored in the artifact."""
    if settings.full_steps == (0, 0):
        return {}
    if isinstance(source, ModelSource):
        raise InputError("full_steps needs the model's sampler; name a model folder instead of a model object")
    if len(source.components) > 1:
        raise InputError(f"--full-steps counts the steps of one denoiser; {source.label} has two")
    scheduler = load_scheduler(source)
    model = source.skeleton()
    family, tokens = find_family(model), latent_tokens(model, settings.conditions)
    set_timesteps(scheduler, settings.steps, tokens, family.sigmas(settings.steps))
    timesteps = [float(t) for t in scheduler.timesteps]
    return {"steps": plan_steps(timesteps, *settings.full_steps, scale=family.timestep_scale).to_dict()}


def describe(source: Source | ModelSource, recipe: Recipe, settings: Options) -> dict[str, Any]:
    """Everything the artifact's numbers follow from; also what a resumed run must have in common with the first."""
    from .. import __version__

    pruned = short_record(source.transformer) if isinstance(source, Source) else None
    sampled = settings.workload().to_dict()
    return {
        "tool": f"vdit-quant {__version__}",
        "torch": torch.__version__,
        "source": source.label,
        "source_fingerprint": source.fingerprint(),
        **({"pruned": pruned} if pruned is not None else {}),
        "recipe": recipe.to_dict(),
        "workload": sampled if isinstance(source, Source) else {"data": "calls of its own", "steps": settings.steps},
        "full_steps": list(settings.full_steps),
        "budget": settings.budget and [settings.budget, settings.sensitivity],
    }


def compress_blocks(
    source: Source | ModelSource, plan: Plan, settings: Options, workspace: Workspace, progress: Progress
) -> None:
    """Compresses block by block; a finished block is kept for a resumed run."""
    device = pick_device(settings.device)
    tuner = open_tuner(source, settings, device, progress) if needs_tuning(plan) else None
    progress.stage("compressing", len(plan.compressed))
    try:
        compress_units(source, plan, device, tuner, workspace, progress)
    finally:
        if tuner is not None:
            tuner.close()


def settle_plan(plan: Plan, workspace: Workspace, progress: Progress) -> Plan:
    """The plan as the finished blocks have it, and a word on what was decided."""
    settled = settle(plan, lambda number: workspace.names(block_part(number)))
    if searched := sum(layer.is_open for layer in plan.compressed):
        changed = sum(a != b for a, b in zip(plan.compressed, settled.compressed, strict=True))
        progress.note(f"rotation left out of {changed} of {searched} layers, which err less without it")
    return settled


def compress_units(
    source: Source | ModelSource,
    plan: Plan,
    device: torch.device,
    tuner: BlockTuner | None,
    workspace: Workspace,
    progress: Progress,
) -> None:
    done = 0
    for number, (block, layers) in enumerate(plan.units()):
        if workspace.has(block_part(number)):
            if tuner is not None:
                tuner.attach(layers, workspace.load(block_part(number)))
        else:
            stats = statistics.load(workspace, number, device)
            folds = [fold for fold in plan.folds if fold.consumers[0] in {layer.name for layer in layers}]

            def report(layer: LayerPlan, offset: int, start: int = done) -> None:
                progress.advance(start + offset, layer.name)

            tensors = compress_unit(layers, folds, source.checkpoint, stats, device, report)
            workspace.save(block_part(number), tensors if tuner is None else tuner.tune(block, layers, tensors))
        done += len(layers)
    progress.advance(done, "all layers")


def open_tuner(source: Source | ModelSource, settings: Options, device: torch.device, progress: Progress) -> BlockTuner:
    """The trainer of blocks, on calls of a sampling run in float32."""
    progress.stage("recording calls to train on", 1)
    if isinstance(source, ModelSource):
        return BlockTuner(source.model, find_family(source.model), source.run, None, progress)
    sampler, workload = make_sampler(source, torch.float32, device), settings.workload()
    few = dataclasses.replace(workload, samples=min(workload.samples, TUNED_SAMPLES))
    run = partial(sampler.run, few, decode=False)
    return BlockTuner(sampler.denoiser, sampler.family, run, settings.steps, progress)
