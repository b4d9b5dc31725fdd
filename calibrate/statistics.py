"""Gathering the statistics that methods ask for: as few sampling runs as the memory limit allows, one file a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..evaluate.offload import open_sampler
from ..evaluate.sampling import make_sampler
from ..evaluate.workload import Workload
from ..quantize.errors import InputError
from ..quantize.row_sample import ROWS
from ..quantize.stats import LayerStats
from ..runtime.family import find_family
from ..runtime.load import pick_dtype
from ..runtime.source import Source
from ..runtime.step import StepTracker
from .compress import read_layer
from .model_source import ModelSource
from .plan import LayerPlan, Plan
from .progress import Progress
from .record import BINS, Recorder
from .replay import BlockChain, Place
from .workspace import Workspace

Unit = tuple[str, list[LayerPlan]]


def gather(
    source: Source | ModelSource,
    plan: Plan,
    workload: Workload,
    device: torch.device,
    workspace: Workspace,
    progress: Progress,
    memory: float,
    offload: bool = False,
) -> None:
    """Stores, for every block that has none yet, the statistics its layers' methods ask for.

    memory   bytes that statistics may take at a time; the model is run once for each batch of blocks that fits
    offload  at most one block of the model is on the device at a time, with one block's statistics: see `_stream`
    """
    missing = [
        (number, unit)
        for number, unit in enumerate(plan.units())
        if any(layer.needs() for layer in unit[1]) and not workspace.has(part_name(number))
    ]
    if not missing:
        return
    progress.stage("checking weights", len(plan.compressed))
    for done, layer in enumerate(plan.compressed):  # a NaN weight would come up as a NaN input of another layer
        progress.advance(done, layer.name)
        read_layer(layer.name, source.checkpoint, device)
    if offload:
        _stream(source, missing, workload, device, workspace, progress)
        return
    passes = _passes(missing, memory)
    total = sum(unit_bytes(unit) for _, unit in missing)
    progress.note(f"statistics of {len(missing)} blocks take {total / 1e6:,.0f} MB: {len(passes)} sampling run(s)")
    run = _Runner(source, workload, device, progress)
    for number, batch in enumerate(passes):
        needs = {name: kinds for _, unit in batch for name, kinds in _needs(unit).items()}
        recorded = run(needs, f"recording activations, run {number + 1} of {len(passes)}")
        for index, unit in batch:
            save(workspace, index, {name: recorded[name] for name in _needs(unit)})
        del recorded  # before the next run gathers as much again


def _needs(unit: Unit) -> dict[str, frozenset[str]]:
    return {layer.name: layer.needs() for layer in unit[1] if layer.needs()}


def _stream(
    source: Source | ModelSource,
    missing: Sequence[tuple[int, Unit]],
    workload: Workload,
    device: torch.device,
    workspace: Workspace,
    progress: Progress,
) -> None:
    """The same statistics from a model that does not fit: one sampling run with its blocks streamed, in which the first
    block's inputs are kept, then block by block on these. Raises InputError for blocks that cannot be run alone."""
    if isinstance(source, ModelSource):
        raise InputError(f"{source.label}: --offload needs a model on disk; this one is in memory already")
    with open_sampler(source, pick_dtype(workload.dtype, device), device, offload=True) as (sampler, stream):
        assert stream is not None
        model, family = sampler.denoiser, sampler.family
        blocks, units = family.block_names(model), {unit[0]: (number, unit) for number, unit in missing}
        outside = units.pop("outside", (-1, ("outside", [])))
        tracker = StepTracker(model, family)
        with tracker, BlockChain(model, blocks, tracker, workspace.folder) as chain:
            progress.stage("sampling, a block at a time", len(list(sampler.batches(workload))) * workload.steps)
            with Recorder(model, family, _needs(outside[1]), workload.steps) as recorder:
                sampler.run(workload, lambda done, _: progress.advance(done, f"sampler call {done}"), decode=False)
            chain.stop()
            progress.note(f"inputs of {len(chain.places)} calls kept, {chain.bytes / 1e6:,.0f} MB of them in memory")
            if outside[1][1]:
                save(workspace, outside[0], recorder.result())
            last = max((blocks.index(name) for name in units), default=-1)
            progress.stage("recording activations, a block at a time", last + 1)
            for index, block in enumerate(blocks[: last + 1]):
                progress.advance(index, block)
                number, unit = units.get(block, (-1, (block, [])))
                with (
                    stream.held(block),
                    Recorder(model, family, _needs(unit), workload.steps, place=Place()) as recorder,
                ):
                    chain.run(index, device, recorder.go_to)
                if unit[1]:
                    save(workspace, number, recorder.result())
            progress.advance(last + 1, "all blocks")


class _Runner:
    """Runs the model once with a recorder on the given layers; the model is loaded on the first run and kept."""

    def __init__(
        self, source: Source | ModelSource, workload: Workload, device: torch.device, progress: Progress
    ) -> None:
        self.workload, self.progress, self.source = workload, progress, source
        if isinstance(source, ModelSource):
            if source.data is None:
                raise InputError(f"{source.label}: the method needs statistics; pass data= (what to call it with)")
        else:
            progress.stage("loading the model", 1)
            self.sampler = make_sampler(source, pick_dtype(workload.dtype, device), device)

    def __call__(self, needs: Mapping[str, frozenset[str]], title: str) -> dict[str, LayerStats]:
        workload = self.workload
        if isinstance(self.source, ModelSource):
            self.progress.stage(title, 1)
            model = self.source.model
            with Recorder(model, find_family(model), needs, workload.steps) as recorder:
                self.source.run()
            return recorder.result()
        calls = len(list(self.sampler.batches(workload))) * workload.steps
        self.progress.stage(title, calls)
        with Recorder(self.sampler.denoiser, self.sampler.family, needs, workload.steps) as recorder:
            told = self.progress.advance
            self.sampler.run(workload, lambda done, _: told(done, f"sampler call {done}"), decode=False)
        return recorder.result()


def default_memory(source: Source | ModelSource, device: torch.device) -> float:
    """Bytes that statistics may take unless told: half of the model's own at 16 bits, or of what a GPU has free beside
    all that is loaded with it, if that is more; at least 0.5 GB."""
    weights = sum(2 * torch.Size(shape).numel() for shape, _ in source.checkpoint.headers.values())
    free = 0
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] - max(weights, _stored_bytes(source))
    return max(0.5e9, 0.5 * weights, 0.5 * free)


def _stored_bytes(source: Source | ModelSource) -> int:
    """Bytes of the weight files of a model and of the pipeline around it; 0 for one that is in memory."""
    if isinstance(source, ModelSource):
        return 0
    return sum(path.stat().st_size for path in source.root.glob("**/*.safetensors"))


def _passes(units: list[tuple[int, Unit]], memory: float) -> list[list[tuple[int, Unit]]]:
    """Batches of consecutive blocks whose statistics fit into `memory` together; a larger block goes alone."""
    out: list[list[tuple[int, Unit]]] = [[]]
    filled = 0.0
    for number, unit in units:
        size = unit_bytes(unit)
        if out[-1] and filled + size > memory:
            out.append([])
            filled = 0.0
        out[-1].append((number, unit))
        filled += size
    return out


def unit_bytes(unit: Unit) -> int:
    """Upper bound of the bytes of a block's statistics (q, k and v share theirs at run time)."""
    total = 0
    for layer in unit[1]:
        if needs := layer.needs():
            columns = BINS * 2 + 1 + (layer.k if "gram" in needs else 0) + (ROWS if "rows" in needs else 0)
            total += 4 * layer.k * columns
    return total


def part_name(number: int) -> str:
    return f"stats-{number:04d}"


def save(workspace: Workspace, number: int, stats: Mapping[str, LayerStats]) -> None:
    """Stores one block's statistics; layers that share them are noted, not stored again."""
    owners: dict[int, str] = {}
    tensors, notes = {}, {}
    for name, value in stats.items():
        owner = owners.setdefault(id(value), name)
        notes[name] = owner
        if owner == name:
            tensors.update({f"{name}|{key}": t for key, t in value.to_tensors().items()})
    workspace.save(part_name(number), tensors, notes)


def load(workspace: Workspace, number: int, device: torch.device) -> dict[str, LayerStats]:
    """One block's statistics by layer name, on `device`; empty when its methods need none."""
    if not workspace.has(part_name(number)):
        return {}
    tensors, notes = workspace.load(part_name(number)), workspace.notes(part_name(number))
    owned = {}
    for owner in set(notes.values()):
        own = {key.split("|", 1)[1]: t.to(device) for key, t in tensors.items() if key.startswith(f"{owner}|")}
        owned[owner] = LayerStats.from_tensors(own)
    return {name: owned[owner] for name, owner in notes.items()}
