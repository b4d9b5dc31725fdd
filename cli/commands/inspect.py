"""`vdit-quant inspect`: what is inside an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def run(
    artifact: Annotated[Path, typer.Argument(help="Folder that `vdit-quant calibrate` wrote.")],
    device: Annotated[str | None, typer.Option(help="Device to explain the kernels for.")] = None,
    component: Annotated[str | None, typer.Option(help="Which denoiser of a pipeline that has two.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show per-layer formats, true bytes, and the kernel that will run here and why."""
    from ...runtime.describe import describe_artifact
    from ..console import bold, console, human_bytes, print_table, table

    found = describe_artifact(artifact, device, component)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console.print(bold(artifact), f": {found['class'] or 'no class'}, schema {found['version']}", sep="")
    if len(found["components"]) > 1:
        console.print(f"  {found['component']} of {' and '.join(found['components'])}: --component names the other")
    if not found["known"]:
        console.print("  a model of another class than diffusers has: layers as the files tell them, each by itself;")
        console.print("  vdit_quant.load_into(model, folder) loads it")
    for key, value in found["provenance"].items():
        if not isinstance(value, dict) and value not in (None, [0, 0]):  # what was not asked for
            console.print(f"  {key}: {value}")
    rows = table(
        "layers",
        "count",
        "spec",
        "bits/weight",
        "bytes",
        "run by",
        "kernels",
        right=("count", "bits/weight", "bytes"),
        fold=("kernels",),
    )
    for row in found["layers"]:
        bits = f"{row['bits_per_weight']:.2f}"
        rows.add_row(
            row["pattern"],
            str(row["count"]),
            row["spec"],
            bits,
            human_bytes(row["bytes"]),
            row["backend"],
            row["kernels"],
        )
    print_table(rows)
    console.print(
        f"compressed layers {human_bytes(found['compressed_bytes'])} "
        f"({found['ratio']:.3f}x of 16 bits), everything else {human_bytes(found['other_bytes'])}"
    )
    for kind, verdict in found["blocks"].items():
        console.print(f"  {kind} on a GPU: {verdict}")
    for line in found["reasons"]:
        console.print(f"  {line}")
