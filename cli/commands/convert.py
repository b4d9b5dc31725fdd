"""`vdit-quant convert`: a published low-bit checkpoint as an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    checkpoint: Annotated[Path, typer.Argument(help="Ternary checkpoint in TerDiT's layout, as one safetensors file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write the artifact to.")],
    activations: Annotated[
        str | None, typer.Option(help="Format of the activations, such as a8tok. Default: the compute dtype.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads, which the file does not tell.")] = 32,
    sample_size: Annotated[int, typer.Option(min=1, help="Latent pixels a side; 32 for images of 256 pixels.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Turn a ternary checkpoint into an artifact: of a Large-DiT, or of a model class of your own."""
    from ...quantize.spec import LayerSpec
    from ...runtime.checkpoint import read_json
    from ...runtime.terdit import import_terdit
    from ..console import bold, console

    spec = LayerSpec.parse(f"wt-{activations}" if activations else "wt")
    layers = import_terdit(checkpoint, output, spec.activation, overwrite, heads, sample_size)
    weights = sum(n * k for n, k in layers.values())
    console.print(f"{len(layers)} ternary layers, {weights:,} weights, as {spec.name} ->", bold(output))
    if kind := read_json(output / "config.json").get("_class_name"):
        console.print(f"  a {kind} of {heads} heads: vdit_quant.load('{output}')")
    else:
        console.print(f"  no Large-DiT of {heads} heads: vdit_quant.load_into(model, '{output}') fills one of yours")
