"""`vdit-quant prune`: a checkpoint in, a shallower checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    model: Annotated[
        str | None,
        typer.Argument(help="Pipeline folder, transformer folder or hub id. Without one: the bundled demo checkpoint."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write the pruned model to.")] = None,
    keep: Annotated[str, typer.Option(help="Blocks to keep: 14; for a model of several stacks 10,20 or NAME=10.")] = "",
    criterion: Annotated[
        str,
        typer.Option(help="learned, even, block_influence, sensitivity, relative_error or magnitude."),
    ] = "learned",
    plan: Annotated[
        Path | None, typer.Option(help="A prune plan or a pruned model's prune.json, in the place of a criterion.")
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="N:M group of the learned criterion: once for all groups, or once for each."),
    ] = None,
    search: Annotated[str, typer.Option(help="Budget of the learned criterion: 2000 steps, 60s, 5min, 1h.")] = "60s",
    recover: Annotated[
        str, typer.Option(help="Budget of the recovery training. 0: none, which gives an initialisation.")
    ] = "8min",
    distill: Annotated[
        str, typer.Option(help="Recovery learns from the teacher's features and outputs, its output, or none.")
    ] = "features",
    mask: Annotated[
        float, typer.Option(min=0, help="Sigmas beyond which activations are left out of the feature loss; 0: none.")
    ] = 2.0,
    features: Annotated[float, typer.Option(min=0, help="Weight of the feature loss at the start.")] = 0.02,
    output_weight: Annotated[
        float | None, typer.Option(help="Weight of the teacher's outputs. Default: 1; 0.9 with --data.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of safetensors shards with latents. Default: the teacher's own samples.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples the teacher makes. Default: 16,384; on a CPU 256.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the teacher.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale of the teacher's samples.")] = 1.0,
    conditions: Annotated[
        Path | None, typer.Option(help="Conditions file (safetensors) for the teacher's samples.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder to keep the teacher's samples in for other runs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples a step, over all processes.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Samples that run at a time.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: from batch size and width.")] = None,
    drop: Annotated[float, typer.Option(help="Share of samples trained without condition.")] = 0.1,
    ema: Annotated[float | None, typer.Option(help="Decay of the average. Default: a twentieth of the run.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit (bitsandbytes).")] = "adamw",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile blocks. Default: for long runs on a GPU.")
    ] = None,
    grids: Annotated[int, typer.Option(min=0, help="Pictures of samples during the recovery.")] = 4,
    save_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints. Default: one a minute.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data, search and recovery.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: the GPU if there is one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; touch no weights.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of this command.")] = False,
) -> None:
    """Take blocks out of a Diffusion Transformer and train the rest to make up for them."""
    from ...prune.options import Options
    from ...prune.pipeline import check_data, open_source, prune_model
    from ..console import reporting, show_command
    from ..prune_table import print_preview, print_result

    options = Options(
        keep=keep,
        criterion=criterion,
        plan=None if plan is None else str(plan),
        groups=tuple(group or ()),
        search=search,
        recover=recover,
        distill=distill,
        output_weight=output_weight,
        features=features,
        mask=mask or None,
        samples=samples,
        steps=steps,
        guidance=guidance,
        conditions=None if conditions is None else str(conditions),
        cache=None if cache is None else str(cache),
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        drop=drop,
        ema=ema,
        optimizer=optimizer,
        checkpointing=checkpointing,
        compile=compile_,
        grids=grids,
        save_steps=save_steps,
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite,
    )
    target = print_preview(model, output, options, data, dry_run)
    if dry_run:
        check_data(open_source(model), options, data)
        return
    with reporting() as reporter:
        written = prune_model(model, target, data, progress=reporter, **vars(options))
    print_result(written)
    given = () if conditions is None else ("--conditions", conditions)
    show_command("vdit-quant", "compare", written, *given)
    show_command("vdit-quant", "calibrate", written, "--bits", "w4a8", *given)
