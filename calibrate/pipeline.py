"""The whole job on one page: a checkpoint in, a compressed artifact out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..evaluate.sampling import Workload, load_scheduler, make_sampler
from ..quantize.allocate import Budget
from ..quantize.errors import InputError, OutputError
from ..quantize.recipe import Recipe, load_shipped
from ..runtime.artifact import is_artifact
from ..runtime.demo import DEMO
from ..runtime.family import find_family
from ..runtime.lineage import short_record
from ..runtime.load import pick_device
from ..runtime.schedule import plan_steps
from ..runtime.source import Source, find_source
from ..runtime.writer import check_output
from . import statistics
from .assemble import block_part, write_artifact
from .block_tuning import BlockTuner, needs_tuning
from .compress import compress_unit
from .mixed import allocate_bits, prepare, require_disk_source, settled_bits
from .model_source import Data, ModelSource
from .plan import LayerPlan, Plan, check_formats, make_plan, settle
from .progress import Progress
from .workspace import Workspace

# Calibration draws its noise and conditions from here on, so that no comparison's seed repeats them.
CALIBRATION_SEEDS = 1_000_000
TUNED_SAMPLES = 32
"""Samples whose calls blocks are trained on, at most: these calls are held in memory."""


@dataclass(frozen=True)
class Options:
    """How to calibrate.

    bits        a shipped recipe: w8a8, w4a8, w4a4, w2a16, ...
    recipe      a recipe file or object, in the place of `bits`
    method      method for the attention and feed-forward layers, in the place of the recipe's
    group_size  weight group size, in the place of the recipe's
    params      "key=value" settings of that method
    budget      mixed precision: 4.5bits, 2.5x, 120MB or 3.2ms for all compressed layers together
    sensitivity how a layer's share of the error is measured for that: drift (cheap), or samples
    full_steps  how many first and last sampling steps run with activations in the compute dtype
    keep        globs of layers that keep their precision
    steps, samples, seed, guidance   the sampling run that statistics are taken from
    conditions  a conditions file for that run, for a bare transformer (see `evaluate/conditions.py`)
    device, dtype   where, and in which compute dtype, the model runs
    stats_gb    memory that statistics may take at a time; more blocks than fit mean more sampling runs.
                Default: half of what the model's weights take, at least 0.5 GB
    offload     one block of the model on the device at a time, for models that do not fit; slower, same artifact
    resume      go on where an interrupted run of the same settings stopped
    overwrite   replace an existing output
    i_know      use formats that are known to destroy a model that was not trained with them
    """

    bits: str = "w4a8"
    recipe: str | Path | Recipe | None = None
    method: str | None = None
    group_size: int | None = None
    params: tuple[str, ...] = ()
    full_steps: tuple[int, int] = (0, 0)
    budget: str | None = None
    sensitivity: str = "drift"
    keep: tuple[str, ...] = ()
    steps: int = 20
    samples: int = 32
    seed: int = 0
    guidance: float | None = None
    conditions: str | None = None
    device: str | None = None
    dtype: str | None = None
    stats_gb: float | None = None
    offload: bool = False
    resume: bool = False
    overwrite: bool = False
    i_know: bool = False

    def resolve_recipe(self) -> Recipe:
        if isinstance(self.recipe, Recipe):
            recipe = self.recipe
        else:
            recipe = load_shipped(self.bits) if self.recipe is None else Recipe.from_toml(self.recipe)
        recipe = recipe if self.method is None else recipe.with_method(self.method)
        recipe = recipe.with_params(self.params) if self.params else recipe
        recipe = recipe if self.group_size is None else recipe.with_group_size(self.group_size)
        if self.budget is not None:
            Budget.parse(self.budget)
            # a folded scale changes two layers at once, so a layer could not be measured alone
            recipe = recipe.without_folds()
        return recipe.with_keep(self.keep)

    def workload(self) -> Workload:
        seed = CALIBRATION_SEEDS + self.seed
        return Workload(self.samples, self.steps, seed, self.guidance, conditions=self.conditions, dtype=self.dtype)


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
    settings, progress = Options(**options), progress or Progress()
    source = open_source(model, data)
    recipe = settings.resolve_recipe()
    target = Path(output) if output is not None else default_output(source.label, recipe)
    check_output(target, settings.overwrite)
    plan = plan_source(source, recipe)
    if not settings.i_know:
        check_formats(plan)
    if settings.offload and needs_tuning(plan):
        raise InputError("--offload: the method trains whole blocks of the model, which must fit; use its steps=0")
    plans, device = run_time_plans(source, settings), pick_device(settings.device)
    sizing = bits = None
    if settings.budget is not None:
        require_disk_source(source)
        sizing = prepare(plan, settings.budget, settings.sensitivity, device, settings.offload)
    workspace = Workspace(target)
    provenance = describe(source, recipe, settings)
    if workspace.open(provenance, settings.resume):
        progress.note("resuming: finished parts of the interrupted run are used")
    try:
        memory = statistics.default_memory(source) if settings.stats_gb is None else settings.stats_gb * 1e9
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
    write_artifact(source, plan, workspace, provenance, target, settings.overwrite, plans)
    workspace.remove()
    return target


def open_source(model: str | Path | nn.Module | None, data: Data | None = None) -> Source | ModelSource:
    """The source behind what the user named. Raises InputError for an artifact that is already compressed."""
    if isinstance(model, nn.Module):
        return ModelSource(model, data)
    source = find_source(DEMO if model is None else model)
    if is_artifact(source.transformer):
        raise InputError(f"{source.label}: already a compressed artifact; calibrate the original checkpoint")
    return source


def default_output(label: str, recipe: Recipe) -> Path:
    return Path(f"{label.rstrip('/').rsplit('/', 1)[-1]}-{recipe.name}")


def plan_source(source: Source | ModelSource, recipe: Recipe) -> Plan:
    """The plan for a source, checked against its checkpoint. Reads names and shapes, no weights."""
    skeleton = source.skeleton()
    plan = make_plan(skeleton, find_family(skeleton), recipe)
    headers = source.checkpoint.headers
    for layer in plan.compressed:
        found = headers.get(f"{layer.name}.weight")
        if found is None or found[0] != (layer.n, layer.k):
            held = "no such tensor" if found is None else f"{list(found[0])}"
            raise InputError(
                f"{source.label}: config and weights disagree: {layer.name}.weight: "
                f"the config says [{layer.n}, {layer.k}], the file holds {held}"
            )
    return plan


def parse_full_steps(text: str) -> tuple[int, int]:
    """ "FIRST,LAST" -> two counts. Raises InputError for anything else."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise InputError(f"--full-steps '{text}': expected FIRST,LAST, such as 2,1")
    return int(parts[0]), int(parts[1])


def run_time_plans(source: Source | ModelSource, settings: Options) -> dict[str, Any]:
    """The decisions that act at run time, by kind, as they are stored in the artifact."""
    if settings.full_steps == (0, 0):
        return {}
    if isinstance(source, ModelSource):
        raise InputError("full_steps needs the model's sampler; name a model folder instead of a model object")
    scheduler = load_scheduler(source)
    scheduler.set_timesteps(settings.steps)
    scale = find_family(source.skeleton()).timestep_scale
    timesteps = [float(t) for t in scheduler.timesteps]
    return {"steps": plan_steps(timesteps, *settings.full_steps, scale=scale).to_dict()}


def describe(source: Source | ModelSource, recipe: Recipe, settings: Options) -> dict[str, Any]:
    """Everything the artifact's numbers follow from; also what a resumed run must have in common with the first."""
    from .. import __version__

    pruned = short_record(source.transformer) if isinstance(source, Source) else None
    return {
        "tool": f"vdit-quant {__version__}",
        "torch": torch.__version__,
        "source": source.label,
        "source_fingerprint": source.fingerprint(),
        **({"pruned": pruned} if pruned is not None else {}),
        "recipe": recipe.to_dict(),
        "workload": settings.workload().to_dict(),
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
        return BlockTuner(source.model, find_family(source.model), source.run, settings.steps, progress)
    sampler, workload = make_sampler(source, torch.float32, device), settings.workload()
    few = dataclasses.replace(workload, samples=min(workload.samples, TUNED_SAMPLES))
    return BlockTuner(sampler.denoiser, sampler.family, lambda: sampler.run(few), settings.steps, progress)
