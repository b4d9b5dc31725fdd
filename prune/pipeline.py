"""The whole job on one page: a checkpoint in, a shallower checkpoint out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.options import check_conditions
from ..calibrate.progress import Progress
from ..calibrate.workspace import Workspace
from ..evaluate.sampling import load_scheduler
from ..quantize.errors import InputError, OutputError
from ..runtime.artifact import is_artifact
from ..runtime.checkpoint import read_json
from ..runtime.demo import DEMO
from ..runtime.family import Family, find_family
from ..runtime.lineage import is_pruned
from ..runtime.load import default_dtype, pick_device
from ..runtime.source import Source, find_source, load_transformer
from ..runtime.writer import check_target, name_output
from .criterion import Study, find_criterion
from .generate import generate_latents
from .latents import Latents, collect_latents, fingerprint_shards, read_latents
from .objective import Batch, objective_of
from .options import Options
from .patterns import cut
from .plan import PrunePlan, Stack, find_stacks, parse_keep
from .plot import can_plot, plot_run
from .recover import check_checkpointing, measure, recover
from .stream import Stream
from .team import Team, find_team
from .writer import write_pruned

Data = str | Path | Iterable[Mapping[str, Tensor]]
_HELD_OUT = 256  # samples that losses are compared on and nothing is trained on


def prune_model(
    model: str | Path | None = None,
    output: str | Path | None = None,
    data: Data | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Takes blocks out of `model`, trains the rest to make up for them, and writes it; returns its folder.

    model    a pipeline folder, a transformer folder, a hub id, or None: the bundled demo checkpoint
    output   default: the model's name with the blocks kept, in the current folder
    data     latents to train on: a folder of safetensors shards, or an iterable of mappings (see `latents.py`);
             None: the teacher samples its own
    options  the fields of `Options`; `keep` (or `plan`) is required

    Raises InputError, with nothing left half written, for anything in the input that cannot be used, and `Diverged`
    when training meets NaN; what was sampled and learned until then is kept for `resume`.
    """
    settings, progress = Options(**options), progress or Progress()
    settings.check()
    source = open_source(model)
    stacks = find_stacks(skeleton := source.skeleton(), find_family(skeleton))
    keep = chosen_depths(settings, stacks)
    target = Path(output) if output is not None else default_output(source, keep)
    check_target(target, source, settings.overwrite, is_pruned)
    check_data(source, settings, data)
    if settings.checkpointing:
        check_checkpointing(skeleton)
    team, device = find_team(pick_device(settings.device))
    workspace, record = Workspace(target), describe(source, settings, data)
    # flat, so that a refused resume names the option that is another
    job = {name: value for name, value in record.items() if name != "settings"} | record["settings"]
    del job["lr"]  # a run that diverged goes on with a lower one
    for name in ("plan", "data"):  # wherever they lie
        job[name] = job[name]["fingerprint"] if isinstance(job[name], dict) else job[name]
    if team.is_main and (line := workspace.open(job, settings.resume)):
        progress.note(line)
    team.wait()
    run = Run(source, settings, workspace, team, device, progress if team.is_main else Progress())
    try:
        with workspace.kept():
            plan, student, found = train(run, keep, data)
    except OutputError:
        raise
    except InputError as error:  # what has been sampled and trained is kept
        if not any(workspace.folder.rglob("*.safetensors")):
            workspace.remove()
        elif str(workspace.folder) not in str(error):
            run.progress.note(f"what is finished is kept in {workspace.folder}, for the same command with --resume")
        raise
    if team.is_main:
        with workspace.kept():
            if can_plot():
                plot_run(found["log"], plan, workspace.folder / "prune.png")
            write_pruned(source, plan, student, {**record, **found}, workspace.folder, target, settings.overwrite)
        workspace.remove()
    team.wait()
    return target


def train(run: Run, keep: tuple[int, ...], data: Data | None) -> tuple[PrunePlan, nn.Module, dict[str, Any]]:
    """The plan, the pruned model, and what is worth recording of how it came about."""
    teacher = load_teacher(run.source, run.device)
    stacks = find_stacks(teacher, find_family(teacher))
    chosen_depths(run.settings, stacks)  # which blocks are pinned shows in the weights alone
    latents, gathering = timed(lambda: gather_latents(run, teacher, data))
    stream, held = make_stream(run, teacher, latents)
    (plan, search), searching = timed(lambda: choose_plan(run, teacher, stacks, keep, stream, data is not None))
    student, outcome = recover(run, teacher, plan, stream, held, data is not None)
    found = {
        "plan": plan.to_dict(),
        "recovered": bool(outcome.history),
        "losses": {"teacher": measure(teacher, teacher, held, run.settings.micro_batch), **outcome.losses},
        "seconds": {"data": gathering, "search": searching, "recovery": outcome.seconds},
        "batch_size": stream.batch_size,
        "log": {"search": search, "recovery": outcome.history},
    }
    return plan, student, found


@dataclass(frozen=True)
class Run:
    """What every stage of a run works with."""

    source: Source
    settings: Options
    workspace: Workspace
    team: Team
    device: torch.device
    progress: Progress


def open_source(model: str | Path | None) -> Source:
    """The source behind what the user named. Raises InputError for a compressed artifact."""
    source = find_source(DEMO if model is None else model)
    if is_artifact(source.transformer):
        raise InputError(
            f"{source.label}: a compressed artifact cannot be trained; prune first, then calibrate the result"
        )
    if len(source.components) > 1:
        raise InputError(
            f"{source.label}: two denoisers, each for a part of the noise levels; a student is trained on all of them"
        )
    return source


def chosen_depths(settings: Options, stacks: tuple[Stack, ...]) -> tuple[int, ...]:
    """How many blocks stay in each stack. Raises InputError when `keep` and plan say nothing, or not the same, and for
    a plan or groups that these stacks cannot follow."""
    planned = () if settings.plan is None else tuple(len(s.kept) for s in read_plan(settings.plan, stacks).stacks)
    if not settings.keep and not planned:
        known = ", ".join(f"{stack.depth} {stack.name}" for stack in stacks)
        raise InputError(f"--keep N is needed: how many blocks stay, of {known}")
    keep = parse_keep(str(settings.keep), stacks) if settings.keep else planned
    if planned and keep != planned:
        raise InputError(f"--keep {settings.keep}: the plan {settings.plan} keeps {', '.join(map(str, planned))}")
    if not planned and find_criterion(settings.criterion).trains:
        for stack, count in zip(stacks, keep, strict=True):
            cut(stack, count, settings.groups)
    return keep


def check_data(source: Source, settings: Options, data: Data | None) -> None:
    """Raises InputError, before weights are read, for a folder of data without shards, without data for conditions
    that the teacher cannot be sampled with, and for a model that no scheduler says how to train."""
    settings.check_used(data is not None)
    load_scheduler(source)
    if isinstance(data, str | Path):
        fingerprint_shards(data)
    elif data is None:
        workload = settings.generation(torch.device("cpu")).workload()
        check_conditions(source, workload)


def read_plan(path: str, stacks: tuple[Stack, ...]) -> PrunePlan:
    """The plan in a JSON file, by itself or in the sidecar of a pruned model. Raises InputError."""
    data = read_json(Path(path))
    plan = PrunePlan.from_dict(data.get("plan", data), path)
    plan.check(stacks, path)
    return plan


def default_output(source: Source, keep: tuple[int, ...]) -> Path:
    return name_output(source.label, f"d{'-'.join(map(str, keep))}")


def describe(source: Source, settings: Options, data: Data | None) -> dict[str, Any]:
    """What the result follows from; also what a resumed run must have in common with the first."""
    from .. import __version__

    return {
        "tool": f"vdit-quant {__version__}",
        "torch": torch.__version__,
        "source": source.label,
        "source_fingerprint": source.fingerprint(),
        "settings": settings.job(data),
    }


def load_teacher(source: Source, device: torch.device) -> nn.Module:
    return load_transformer(source, default_dtype(device), device).requires_grad_(False)


def gather_latents(run: Run, teacher: nn.Module, data: Data | None) -> Latents:
    """The training data, from the user or from the teacher. Raises InputError when there is too little of it."""
    family = find_family(teacher)
    if data is None:
        cache = run.settings.cache
        folder = run.workspace.folder / "latents" if cache is None else Path(cache)
        kind = (load_scheduler(run.source), run.settings.generation(run.device))
        generate_latents(teacher, *kind, folder, run.source.fingerprint(), run.progress, run.team)
        data = folder
    found = (
        read_latents(data, teacher, family) if isinstance(data, str | Path) else collect_latents(data, teacher, family)
    )
    if len(found) < 2:
        raise InputError(f"the data holds {len(found)} sample; expected 2 at least, one of them to measure losses on")
    return found


def make_stream(run: Run, teacher: nn.Module, latents: Latents) -> tuple[Stream, Batch]:
    """The training batches, and the held-out batch that losses are measured on."""
    family: Family = find_family(teacher)
    trained, held = latents.split(max(1, min(_HELD_OUT, len(latents) // 8)))
    batch = run.settings.batch(torch.Size(latents.shape).numel(), run.device, run.team.world)
    place = (run.device, run.settings.seed, run.settings.drop, run.team.rank, run.team.world)
    objective = objective_of(load_scheduler(run.source), family).to(run.device)
    stream = Stream(trained.resident(run.device), objective, family, batch, *place)
    return stream, stream.fixed(held)


def choose_plan(
    run: Run, teacher: nn.Module, stacks: tuple[Stack, ...], keep: tuple[int, ...], stream: Stream, has_data: bool
) -> tuple[PrunePlan, list[dict[str, float]]]:
    """The plan, and the log of the search where there was one; kept for a resumed run."""
    workspace, settings = run.workspace, run.settings
    if settings.plan is not None:
        return read_plan(settings.plan, stacks), []
    criterion = find_criterion(settings.criterion)
    if not workspace.has("plan") and (run.team.is_main or criterion.trains):
        study = Study(
            teacher,
            stacks,
            stream,
            workspace,
            settings.training(settings.search),
            settings.distillation(has_data),
            groups=settings.groups,
            team=run.team,
            progress=run.progress,
        )
        plan = criterion.choose(study, keep)
        plan = PrunePlan(plan.stacks, settings.criterion, plan.notes)
        if run.team.is_main:
            workspace.save("plan", {}, {"plan": json.dumps(plan.to_dict())})
    run.team.wait()
    plan = PrunePlan.from_dict(json.loads(workspace.notes("plan")["plan"]))
    searched = workspace.has("search")
    return plan, json.loads(workspace.notes("search")["trainer"])["history"] if searched else []


def timed(work: Any) -> tuple[Any, float]:
    """What `work` returns, and the seconds it took."""
    start = time.perf_counter()
    return work(), round(time.perf_counter() - start, 1)
