"""`vdit-quant calibrate`: a checkpoint in, a compressed artifact out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    model: Annotated[
        str | None,
        typer.Argument(help="Pipeline folder, transformer folder or hub id. Without one: the bundled demo checkpoint."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write the artifact to.")] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Shipped recipe: w8a8, w4a8, w4a8-mod4, w4a4, w3a8, w2a8, w8a16, w4a16, w3a16, w2a16, w8a8-fp8. "
            "Default: w4a8."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Method for attention and feed-forward layers.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of the method, KEY=VALUE; may be given again.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe file (TOML), in the place of --bits.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weight group size, in the place of the recipe's.")] = None,
    full_steps: Annotated[
        str, typer.Option(help="FIRST,LAST: sampling steps that run with activations in the compute dtype.")
    ] = "0,0",
    budget: Annotated[
        str | None, typer.Option(help="Mixed precision under a budget: 4.5bits, 2.5x, 120MB or 3.2ms.")
    ] = None,
    sensitivity: Annotated[
        str, typer.Option(help="How a layer's error is measured for --budget: drift (cheap) or samples.")
    ] = "drift",
    keep: Annotated[
        list[str] | None, typer.Option(help="Glob of layers that keep their precision; may be given again.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Which denoiser of a pipeline that has two: transformer or transformer_2.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the calibration run.")] = 20,
    samples: Annotated[int, typer.Option(min=1, help="Samples of the calibration run.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the calibration run.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the calibration run.")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Size of its samples: 512x512, or with frames 33x480x832. Default: the pipeline's own."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples run at a time.")] = 16,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with a prompt on each line. Default: 48 that ship with the package.")
    ] = None,
    conditions: Annotated[
        Path | None, typer.Option(help="Conditions file (safetensors) for a bare transformer's calibration run.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute dtype of the run. Default: bfloat16 on a GPU.")] = None,
    stats_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory that statistics may take at a time, in GB. Default: half of the model's own, or of what a GPU "
            "has free if that is more; at least 0.5."
        ),
    ] = None,
    offload: Annotated[
        bool,
        typer.Option("--offload", help="Keep one block of the model on the device at a time. Slower; same artifact."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; touch no weights.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    i_know: Annotated[
        bool, typer.Option("--i-know", help="Use formats that destroy a model that was not trained with them.")
    ] = False,
) -> None:
    """Calibrate a Diffusion Transformer and write a compressed artifact."""
    from ...calibrate.options import Options, parse_full_steps
    from ...calibrate.pipeline import plan_job, run_job
    from ...quantize.errors import InputError
    from ..console import bold, console, reporting, show_command
    from ..plan_table import print_bit_plan, print_budget, print_plan

    if bits is not None and recipe is not None:
        raise InputError(f"--bits {bits} and --recipe {recipe}: give one of them, not both")
    options = Options(
        bits=Options.bits if bits is None else bits,
        recipe=recipe,
        method=method,
        group_size=group_size,
        params=tuple(set_ or ()),
        keep=tuple(keep or ()),
        component=component,
        full_steps=parse_full_steps(full_steps),
        budget=budget,
        sensitivity=sensitivity,
        steps=steps,
        samples=samples,
        seed=seed,
        guidance=guidance,
        size=size,
        batch_size=batch_size,
        prompts=None if prompts is None else str(prompts),
        conditions=None if conditions is None else str(conditions),
        device=device,
        dtype=dtype,
        stats_gb=stats_gb,
        offload=offload,
        resume=resume,
        overwrite=overwrite,
        i_know=i_know,
    )
    job = plan_job(model, output, None, options, preview=dry_run)
    plan, names = job.plan, (bold(job.source.label), " as ", bold(job.recipe.name))
    console.print(*names, f", family {plan.family} -> {job.target}", sep="")
    print_plan(plan)
    if budget is not None:
        print_budget(budget)
    for note in job.notes:
        console.print(note)
    if dry_run:
        return
    with reporting() as reporter:
        written = run_job(job, reporter)
    if budget is not None:
        print_bit_plan(written, plan, component)
    console.print("wrote", bold(written))
    given = () if conditions is None else ("--conditions", conditions)
    show_command("vdit-quant", "inspect", written)
    show_command("vdit-quant", "compare", written, *given)
