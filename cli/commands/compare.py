"""`vdit-quant compare`: what compression cost, against full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    artifact: Annotated[Path, typer.Argument(help="Folder that `vdit-quant calibrate` or `prune` wrote.")],
    baseline: Annotated[
        str | None, typer.Option(help="The full-precision model. Default: the one it was made from.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples a seed.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    seed: Annotated[list[int] | None, typer.Option(help="Seed; may be given again. Default: 1 and 2.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's own.")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Size of the samples: 512x512, or with frames 33x480x832. Default: as it was calibrated."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with a prompt on each line. Default: 48 that ship with the package.")
    ] = None,
    conditions: Annotated[
        Path | None, typer.Option(help="Conditions file (safetensors) for a bare transformer.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples run at a time.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute dtype of both. Default: bfloat16 on a GPU.")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Hold one block of the baseline on the device at a time.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Make a kernel fallback an error.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for comparison.json and samples.png.")
    ] = None,
) -> None:
    """Compare an artifact or a pruned model with full precision: same conditions, same noise, sample by sample."""
    from ...evaluate.compare import Unsaved, compare
    from ...evaluate.pairing import calibrated_size, default_baseline
    from ...evaluate.size import parse_size
    from ...evaluate.workload import Workload
    from ...kernels import dispatch
    from ..compare_table import print_comparison
    from ..console import console, reporting

    given, said = (None if path is None else str(path) for path in (conditions, prompts))
    pixels = parse_size(size or calibrated_size(artifact))
    workload = Workload(samples, steps, 0, guidance, batch_size, given, dtype, pixels, said, offload)
    against = baseline or default_baseline(artifact)
    folder = _folder(artifact, output)
    with reporting() as reporter, dispatch.use(strict=strict or None):
        try:
            result = compare(
                artifact,
                against,
                workload,
                tuple(seed or (1, 2)),
                device,
                folder / "samples.png",
                reporter.task,
                folder / "comparison.json",
            )
        except Unsaved as error:
            print_comparison(error.result)
            raise
    print_comparison(result)
    console.print(f"wrote {folder / 'comparison.json'} and {folder / 'samples.png'}")


def _folder(artifact: Path, output: Path | None) -> Path:
    """Where the result goes: never into the model, whose files every copy of it would take along."""
    from ...quantize.errors import InputError
    from ...runtime.writer import name_output

    root, folder = artifact.resolve(), output or name_output(str(artifact), "compare")
    if not folder.resolve().is_relative_to(root):
        return folder
    if output is None:
        return root.parent / folder.name
    raise InputError(f"output {output} lies inside {artifact}; name one outside, such as -o {root}-compare")
