"""The launch table of this machine's GPU: what to measure for a model, measuring it, and merging it into the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels import dispatch, launch_table, tuning
from ..kernels.launch_table import Table
from ..kernels.tuning import Report, Shape, Task
from ..quantize.errors import InputError
from .load import linear_shapes
from .source import find_source
from .writer import try_folder


@dataclass(frozen=True)
class TuningPlan:
    """What a run measures and where the result goes."""

    tasks: list[Task]
    target: Path
    table: Table | None
    kept: int  # shapes asked for that the file has already

    @property
    def candidates(self) -> int:
        return sum(len(task.candidates) for task in self.tasks)

    @property
    def seconds(self) -> float:
        return tuning.estimate(self.tasks)


def parse_shapes(text: str) -> list[Shape]:
    """ "MxNxK,..." -> (M, N, K). Raises InputError naming the part that is not a shape."""
    shapes = []
    for part in text.split(","):
        sizes = part.strip().lower().split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise InputError(f"--shapes: expected MxNxK such as 4096x4608x1152, found {part.strip()!r}")
        shapes.append((int(sizes[0]), int(sizes[1]), int(sizes[2])))
    return shapes


def model_shapes(model: str | Path) -> list[Shape]:
    """Shapes of the linear layers of a model or artifact folder at every number of tokens, from its configuration."""
    return tuning.layer_shapes(linear_shapes(find_source(model).skeleton()).values())


def plan_tuning(
    shapes: list[Shape], ops: list[str] | None, target: Path | None, overwrite: bool, device: torch.device | None
) -> TuningPlan:
    """What to measure, without measuring. `device` None: the table that `target` names, if it exists.

    Raises InputError for an op that cannot be tuned, kernels that cannot be imported, or a folder that cannot be
    looked into; SettingError where there is no home directory to keep a table in.
    """
    if target is None:
        name = "this-gpu" if device is None else launch_table.slug(torch.cuda.get_device_name(device))
        target = dispatch.table_folder() / f"{name}.json"
    try:
        table = launch_table.read_table(target) if target.is_file() else None
    except OSError as error:
        raise InputError(f"launch table {target}: {error.strerror}; --output names another") from None
    known = [] if table is None or overwrite else table.rows()
    try:
        tasks = tuning.plan(shapes, ops, known)
        kept = len(tuning.plan(shapes, ops)) - len(tasks)
    except (ValueError, dispatch.KernelUnavailable) as error:
        raise InputError(str(error)) from None
    return TuningPlan(tasks, target, table, kept)


def tuning_device() -> torch.device:
    """The GPU to measure on. Raises InputError where there is none that runs the kernels."""
    choice = dispatch.available()
    if choice.backend != "triton":
        raise InputError(f"tuning measures on a GPU, and none runs the kernels here: {choice.reason}")
    return torch.device("cuda", torch.cuda.current_device())


def run_tuning(plan: TuningPlan, device: torch.device, report: Report) -> Table:
    """Measure, merge into the file's table, and write the file, also when the run is interrupted."""
    name = torch.cuda.get_device_name(device)
    if plan.table is not None and plan.table.device != name:
        raise InputError(f"launch table {plan.target}: it is for {plan.table.device}, this GPU is {name}")
    _check_writable(plan.target)
    versions = {"triton": dispatch.triton_version() or "", "torch": str(torch.__version__)}
    entries = plan.table.rows() if plan.table else []
    try:
        for entry in tuning.tune(plan.tasks, device, report):
            entries.append(entry)
    finally:
        table = Table.of(name, entries, versions)
        launch_table.write_table(plan.target, table)
        launch_table.reload()
    return table


def _check_writable(target: Path) -> None:
    """Before minutes of measuring."""
    try:
        try_folder(target.parent)
    except OSError as error:
        raise InputError(f"launch table {target} cannot be written: {error.strerror}; --output names another") from None
