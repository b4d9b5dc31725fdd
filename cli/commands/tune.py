"""`vdit-quant tune`: measure the kernels' launch options on this GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    model: Annotated[
        str | None, typer.Argument(help="Model or artifact folder whose layers count. Default: those of known DiTs.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Products to tune instead: MxNxK,... (tokens, outputs, inputs).")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Op to tune; may be given again. Default: every one.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Table. Default: the one read at start.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure again what the table holds already.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be measured and about how long it takes.")
    ] = False,
) -> None:
    """Measure launch options of the kernels on this GPU and write its launch table."""
    from ...kernels import tuning
    from ...quantize.errors import InputError
    from ...runtime import tune
    from ..console import console, reporting

    if model is not None and shapes is not None:
        raise InputError("give a model or --shapes, not both")
    device = None if dry_run else tune.tuning_device()
    if shapes is not None:
        wanted = tune.parse_shapes(shapes)
    else:
        wanted = tuning.known_shapes() if model is None else tune.model_shapes(model)
    plan = tune.plan_tuning(wanted, op, output, overwrite, device)
    if plan.kept:
        console.print(f"{plan.kept} shapes are in the table already and stay (--overwrite measures them again)")
    if dry_run:
        for task in plan.tasks:
            console.print(f"{task.op} {task.m}x{task.n}x{task.k}: {len(task.candidates)} candidates")
    if dry_run or not plan.tasks:
        console.print(f"{len(plan.tasks)} shapes, {plan.candidates} candidates, about {plan.seconds / 60:.0f} min")
        return
    assert device is not None
    with reporting() as reporter:
        reporter.stage("tune", plan.candidates)
        table = tune.run_tuning(plan, device, lambda done, total, detail: reporter.advance(done, detail))
    console.print(f"wrote {plan.target}: {len(table.rows())} entries for {table.device}")
