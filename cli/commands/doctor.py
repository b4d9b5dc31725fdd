"""`vdit-quant doctor`: what this machine can run."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def run(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check this machine: GPU, Triton, which kernels run and which fall back, and why."""
    from ...runtime.doctor import examine
    from ..console import console, print_table, table

    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found["machine"].items():
        console.print(f"{key:>12}: {value}")
    rows = table("kernel", "runs as", "because")
    for row in found["kernels"]:
        rows.add_row(row["op"], row["backend"], row["reason"] or "-")
    print_table(rows)
    for line in found["advice"]:
        console.print(f"- {line}")
