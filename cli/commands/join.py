"""`vdit-quant join`: a LoRA adapter as part of an artifact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer


def run(
    artifact: Annotated[Path, typer.Argument(help="Folder that `vdit-quant calibrate` wrote.")],
    adapter: Annotated[Path, typer.Argument(help="LoRA adapter for the same model, as one safetensors file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write the new artifact to.")],
    scale: Annotated[float, typer.Option(help="Strength of the adapter, times its own alpha / r.")] = 1.0,
    component: Annotated[str | None, typer.Option(help="Which denoiser of a pipeline that has two.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Join a LoRA adapter to an artifact: nothing is quantised again, and blocks stay fused."""
    from ...runtime.adapter import join_lora
    from ..console import bold, console, show_command

    ranks = join_lora(artifact, adapter, output, scale, overwrite, component)
    counts = ", ".join(f"rank {rank} in {count} layers" for rank, count in sorted(Counter(ranks.values()).items()))
    console.print(f"joined {adapter.name}, {counts} ->", bold(output))
    show_command("vdit-quant", "inspect", output)
