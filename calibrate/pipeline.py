"""The whole job on one page: a checkpoint in, a compressed artifact out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..evaluate.sampling import Workload, make_sampler
from ..quantize.errors import InputError, OutputError
from ..quantize.layer import layer_layout
from ..quantize.recipe import Recipe, load_shipped
from ..quantize.stats import LayerStats
from ..runtime.artifact import DTYPES, is_artifact, make_config
from ..runtime.demo import DEMO
from ..runtime.family import find_family
from ..runtime.load import default_dtype, pick_device
from ..runtime.source import Source, find_source
from ..runtime.writer import Entry, check_output, copy_pipeline, staged, write_json, write_tensors
from .compress import compress_layer
from .model_source import Data, ModelSource
from .plan import Plan, make_plan
from .progress import Progress
from .record import Recorder
from .workspace import Workspace


@dataclass(frozen=True)
class Options:
    """How to calibrate.

    bits        a shipped recipe: w8a8, w4a8, w4a16, w8a16
    recipe      a recipe file or object, in the place of `bits`
    method      method for the attention and feed-forward layers, in the place of the recipe's
    group_size  weight group size, in the place of the recipe's
    keep        globs of layers that keep their precision
    steps, samples, seed, guidance   the sampling run that statistics are taken from
    resume      go on where an interrupted run of the same settings stopped
    overwrite   replace an existing output
    """

    bits: str = "w4a8"
    recipe: str | Path | Recipe | None = None
    method: str | None = None
    group_size: int | None = None
    keep: tuple[str, ...] = ()
    steps: int = 20
    samples: int = 8
    seed: int = 0
    guidance: float | None = None
    device: str | None = None
    resume: bool = False
    overwrite: bool = False

    def resolve_recipe(self) -> Recipe:
        if isinstance(self.recipe, Recipe):
            recipe = self.recipe
        else:
            recipe = load_shipped(self.bits) if self.recipe is None else Recipe.from_toml(self.recipe)
        recipe = recipe if self.method is None else recipe.with_method(self.method)
        recipe = recipe if self.group_size is None else recipe.with_group_size(self.group_size)
        return recipe.with_keep(self.keep)

    def workload(self) -> Workload:
        return Workload(self.samples, self.steps, self.seed, self.guidance)


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
    pick_device(settings.device)
    plan = plan_source(source, recipe)
    workspace = Workspace(target)
    provenance = describe(source, recipe, settings)
    if workspace.open(provenance, settings.resume):
        progress.note("resuming: finished parts of the interrupted run are used")
    try:
        gather_statistics(source, plan, settings, workspace, progress)
        compress_blocks(source, plan, settings, workspace, progress)
    except OutputError:
        raise
    except InputError:  # the input must change first, and then nothing finished here is of use
        workspace.remove()
        raise
    write_artifact(source, plan, workspace, provenance, target, settings.overwrite)
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


def describe(source: Source | ModelSource, recipe: Recipe, settings: Options) -> dict[str, Any]:
    """Everything the artifact's numbers follow from; also what a resumed run must have in common with the first."""
    from .. import __version__

    return {
        "tool": f"vdit-quant {__version__}",
        "torch": torch.__version__,
        "source": source.label,
        "source_fingerprint": source.fingerprint(),
        "recipe": recipe.to_dict(),
        "workload": asdict(settings.workload()),
    }


def gather_statistics(
    source: Source | ModelSource, plan: Plan, settings: Options, workspace: Workspace, progress: Progress
) -> None:
    """Runs the model once and stores the statistics of every layer whose method asks for some."""
    needs = {layer.name: layer.needs() for layer in plan.compressed if layer.needs()}
    if not needs or workspace.has("statistics"):
        return
    device = pick_device(settings.device)
    workload = settings.workload()
    progress.stage("recording activations", 1)
    if isinstance(source, ModelSource):
        if source.data is None:
            raise InputError(f"{source.label}: the method needs statistics; pass data= (what to call the model with)")
        with Recorder(source.model, find_family(source.model), needs, settings.steps) as recorder:
            source.run()
    else:
        sampler = make_sampler(source, default_dtype(device), device)
        with Recorder(sampler.denoiser, sampler.family, needs, settings.steps) as recorder:
            calls = len(list(sampler.batches(workload))) * settings.steps
            progress.stage("recording activations", calls)
            sampler.run(workload, lambda done, _: progress.advance(done, f"sampler call {done}"))
    tensors = {f"{name}|{k}": t for name, s in recorder.result().items() for k, t in s.to_tensors().items()}
    workspace.save("statistics", tensors)


def compress_blocks(
    source: Source | ModelSource, plan: Plan, settings: Options, workspace: Workspace, progress: Progress
) -> None:
    """Compresses block by block; a finished block is kept for a resumed run."""
    device = pick_device(settings.device)
    recorded = workspace.load("statistics") if workspace.has("statistics") else {}
    units = plan.units()
    progress.stage("compressing", len(plan.compressed))
    done = 0
    for number, (_, layers) in enumerate(units):
        part = f"block-{number:04d}"
        if not workspace.has(part):
            tensors = {}
            for offset, layer in enumerate(layers):
                progress.advance(done + offset, layer.name)
                stats = _stats_of(layer.name, recorded)
                stats = None if stats is None else stats.to(device)
                out = compress_layer(layer, source.checkpoint.get, stats, device)
                tensors.update({f"{layer.name}.{key}": t for key, t in out.items()})
            workspace.save(part, tensors)
        done += len(layers)
    progress.advance(done, "all layers")


def _stats_of(name: str, recorded: Mapping[str, torch.Tensor]) -> LayerStats | None:
    own = {key.split("|", 1)[1]: t for key, t in recorded.items() if key.startswith(f"{name}|")}
    return LayerStats.from_tensors(own) if own else None


def write_artifact(
    source: Source | ModelSource,
    plan: Plan,
    workspace: Workspace,
    provenance: dict[str, Any],
    target: Path,
    overwrite: bool = False,
) -> None:
    """Puts the finished blocks and the tensors that stay as they are into an artifact folder."""
    config = make_config(plan.specs(), [layer.name for layer in plan.layers], provenance, {})
    entries, origin = _entries(source, plan)
    parts: dict[str, dict[str, torch.Tensor]] = {}

    def get(name: str) -> torch.Tensor:
        part = origin.get(name)
        if part is None:
            return source.checkpoint.get(name).to(entries[name][1])
        if part not in parts:
            parts.clear()
            parts[part] = workspace.load(part)
        return parts[part][name]

    with staged(target, overwrite) as folder:
        inner = folder / "transformer" if source.is_pipeline else folder
        inner.mkdir(exist_ok=True)
        if isinstance(source, Source) and source.is_pipeline:
            copy_pipeline(source.root, folder)
        write_tensors(inner, entries, get)
        write_json(inner / "config.json", {**source.config, "quantization_config": config.to_dict()})


def _entries(source: Source | ModelSource, plan: Plan) -> tuple[dict[str, Entry], dict[str, str]]:
    """Every tensor of the artifact with shape and dtype, and the block file each compressed one is found in."""
    entries: dict[str, Entry] = {}
    origin: dict[str, str] = {}
    fp32 = set(getattr(type(source.skeleton()), "_keep_in_fp32_modules", None) or ())
    replaced = {f"{layer.name}.weight" for layer in plan.compressed}
    for name, (shape, dtype) in source.checkpoint.headers.items():
        if name not in replaced:
            entries[name] = (shape, _kept_dtype(dtype, bool(fp32 & set(name.split(".")))))
    for number, (_, layers) in enumerate(plan.units()):
        for layer in layers:
            assert layer.spec is not None
            for key, layout in layer_layout(layer.n, layer.k, layer.spec).items():
                entries[f"{layer.name}.{key}"] = (layout.shape, layout.dtype)
                origin[f"{layer.name}.{key}"] = f"block-{number:04d}"
    return entries, origin


def _kept_dtype(stored: str, keep_fp32: bool) -> torch.dtype:
    """Tensors that are not compressed keep 16-bit types; float32 becomes bfloat16 unless the model needs it."""
    if stored not in DTYPES:
        raise InputError(f"the checkpoint holds a tensor of type {stored}; expected one of {', '.join(DTYPES)}")
    return torch.bfloat16 if stored == "F32" and not keep_fp32 else DTYPES[stored]
