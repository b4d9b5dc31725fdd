"""The plan of a calibration as a table: one row for the layers that share everything but the block's number."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ..calibrate.mixed import CANDIDATES
from ..calibrate.plan import LayerPlan, Plan
from ..evaluate.plan_plot import plot_plan
from ..quantize.bit_plan import BitPlan
from ..runtime.artifact import read_config
from ..runtime.source import find_source
from .console import console, human_bytes, print_table, table


def print_plan(plan: Plan) -> None:
    """Prints every group of layers with its role, spec, method and bytes, then the totals."""
    rows = table("layers", "count", "role", "shape", "spec", "16-bit", "after", right=("count", "16-bit", "after"))
    for group in _groups(plan.layers):
        first = group[0]
        before, after = sum(p.bytes_before for p in group), sum(p.bytes_after for p in group)
        spec = "16-bit" if first.spec is None else f"{first.spec.name} {first.method}"
        rows.add_row(
            _pattern(first.name) if len(group) > 1 else first.name,
            str(len(group)),
            first.role,
            f"{first.n}x{first.k}",
            spec,
            human_bytes(before),
            human_bytes(after),
        )
    print_table(rows)
    before = sum(p.bytes_before for p in plan.compressed)
    after = sum(p.bytes_after for p in plan.compressed)
    kept = sum(p.bytes_before for p in plan.layers) - before
    elements = sum(p.n * p.k for p in plan.compressed)
    console.print(
        f"compressed layers: {human_bytes(before)} -> {human_bytes(after)} ({after / before:.3f}x, "
        f"{8 * after / elements:.2f} bits a weight with every scale); "
        f"linear layers kept at 16 bits: {human_bytes(kept)}"
    )
    if any(layer.is_open for layer in plan.compressed):
        console.print(
            "layers that turn out to err less without their rotation (h) lose it; --set rotate=always keeps it"
        )


def print_budget(budget: str) -> None:
    """Says that what `print_plan` shows is not final under a budget."""
    console.print(
        f"--budget {budget}: the table is the recipe's plan; the run measures every compressed layer and gives it "
        f"weights as {', '.join(CANDIDATES)}, within the budget"
    )


def print_bit_plan(artifact: Path, plan: Plan, component: str | None = None) -> None:
    """Prints the mixed-precision plan of an artifact, where it has one, by role; draws it beside, with matplotlib.

    component: of a pipeline with several denoisers, the one that was planned
    """
    source = find_source(artifact, component)
    stored = read_config(source.transformer).plans.get("bits")
    if stored is None:
        return
    bits = BitPlan.from_dict(stored)
    specs = sorted({spec.split("-")[0] for spec in bits.layers.values()}, key=lambda s: (len(s), s))
    rows = table("role", *specs, right=tuple(specs))
    roles = {layer.name: layer.role for layer in plan.layers}
    for role in dict.fromkeys(roles[name] for name in bits.layers):
        held = [spec.split("-")[0] for name, spec in bits.layers.items() if roles[name] == role]
        rows.add_row(role, *(str(held.count(spec) or "-") for spec in specs))
    print_table(rows)
    gap = "" if bits.gap is None else f", within {100 * bits.gap:.2f} % of the optimum"
    console.print(
        f"bit plan for {bits.budget}: {bits.bits:.3f} bits a weight, {human_bytes(bits.bytes)}, by {bits.solver}{gap}"
    )
    if find_spec("matplotlib") is not None:
        shapes = {layer.name: (layer.n, layer.k) for layer in plan.layers}
        blocks = list(dict.fromkeys(layer.block for layer in plan.layers if layer.block is not None))
        plot_plan(bits, roles, shapes, blocks, artifact / "bit-plan.png")
        console.print(f"drawn in {artifact / 'bit-plan.png'}")


def _groups(layers: Iterable[LayerPlan]) -> list[list[LayerPlan]]:
    groups: dict[tuple[object, ...], list[LayerPlan]] = {}
    for layer in layers:
        key = (_pattern(layer.name), layer.role, layer.n, layer.k, layer.spec, layer.method, layer.reason)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)
