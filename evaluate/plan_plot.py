"""Pictures of a bit plan: bits by block and role, and error against bits for each way of allocating."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..quantize.allocate import LayerCandidates, allocate, greedy, uniform
from ..quantize.bit_plan import BitPlan
from ..quantize.errors import InputError
from ..quantize.layer import layer_bytes
from ..quantize.spec import LayerSpec
from ..runtime.family import block_of

Shape = tuple[int, int]
Curve = list[tuple[float, float]]

ALLOCATORS: dict[str, Callable[..., BitPlan]] = {"milp": allocate, "greedy": greedy, "uniform": uniform}


def error_curves(
    table: Sequence[LayerCandidates], budgets: Iterable[str | float], weights: Mapping[str, float] | None = None
) -> dict[str, Curve]:
    """Allocator -> (bits a weight, predicted error) of its plan at each budget that can be met, by bits."""
    curves: dict[str, Curve] = {name: [] for name in ALLOCATORS}
    for budget in budgets:
        for name, solve in ALLOCATORS.items():
            try:
                plan = solve(table, budget, weights)
            except InputError as error:
                if "cannot be met" not in str(error):
                    raise
                continue
            curves[name].append((plan.bits, plan.error))
    return {name: sorted(points) for name, points in curves.items()}


def plot_curves(curves: Mapping[str, Curve], path: Path, label: str = "predicted error", log: bool = True) -> None:
    """Writes a PNG, one line an entry: bits a weight across, `label` up. Raises InputError without matplotlib."""
    figure, axes = _figure(1, (6.4, 4.0))
    for name, points in curves.items():
        if points:
            axes[0].plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes[0].set_xlabel("bits a weight, every scale included")
    axes[0].set_ylabel(label)
    if log and any(value > 0 for points in curves.values() for _, value in points):
        axes[0].set_yscale("log")
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    _save(figure, path)


def plot_plan(
    plan: BitPlan, roles: Mapping[str, str], shapes: Mapping[str, Shape], blocks: Sequence[str], path: Path
) -> None:
    """Writes a PNG with one row for each role: for every block the share of its weights that each spec holds, stacked,
    and the average bits on top.

    roles, shapes  layer -> role and (N, K), of all layers of the plan at least
    blocks         names of the blocks in order; layers outside of them share one last column
    Raises InputError without matplotlib, or for a layer that `roles` or `shapes` do not hold.
    """
    shares = plan_shares(plan, roles, shapes, blocks)
    specs = sorted({name for cell in shares.values() for name in cell["weights"]}, key=_stored_bits)
    kinds = list(dict.fromkeys(role for role, _ in shares))
    columns = [*blocks, *([""] if any(block == "" for _, block in shares) else [])]
    figure, axes = _figure(len(kinds), (max(6.4, 0.45 * len(columns) + 2.5), 1.5 * len(kinds) + 1.2))
    colours = _colours(len(specs))
    for row, role in zip(axes, kinds, strict=True):
        for x, block in enumerate(columns):
            cell = shares.get((role, block))
            if cell is None:
                continue
            bottom, total = 0.0, sum(cell["weights"].values())
            for spec, colour in zip(specs, colours, strict=True):
                height = cell["weights"].get(spec, 0) / total
                row.bar(x, height, bottom=bottom, color=colour, width=0.9)
                bottom += height
            row.text(x, 1.02, f"{cell['bits']:.1f}", ha="center", va="bottom", fontsize=7)
        row.set_ylabel(role.replace("_", " "), fontsize=8)
        row.set_ylim(0, 1.25)
        row.set_yticks([])
        row.set_xticks([])
    axes[-1].set_xticks(range(len(columns)), [c.rpartition(".")[2] or "outside" for c in columns], fontsize=7)
    axes[-1].set_xlabel("block")
    axes[0].set_title(f"budget {plan.budget}: {plan.bits:.2f} bits a weight, {plan.solver}", fontsize=9)
    handles = [axes[0].bar(0, 0, color=colour, label=spec) for spec, colour in zip(specs, colours, strict=True)]
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    _save(figure, path)


def plan_shares(
    plan: BitPlan, roles: Mapping[str, str], shapes: Mapping[str, Shape], blocks: Sequence[str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """(role, block) -> {"weights": spec -> number of weights, "bits": average bits a weight}; block "": outside."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    stored: dict[tuple[str, str], int] = {}
    for layer, spec in plan.layers.items():
        if layer not in roles or layer not in shapes:
            raise InputError(f"bit plan: the layer {layer} is not in this model")
        key = (roles[layer], block_of(layer, list(blocks)) or "")
        n, k = shapes[layer]
        weights = cells.setdefault(key, {"weights": {}, "bits": 0.0})["weights"]
        weights[spec] = weights.get(spec, 0) + n * k
        stored[key] = stored.get(key, 0) + layer_bytes(n, k, LayerSpec.parse(spec))
    for key, cell in cells.items():
        cell["bits"] = 8 * stored[key] / sum(cell["weights"].values())
    return cells


def _stored_bits(spec: str) -> tuple[int, str]:
    """Sorting key of specs: bytes of a large layer, then the name."""
    return layer_bytes(4096, 4096, LayerSpec.parse(spec)), spec


def _figure(rows: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib; install it with: pip install matplotlib") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.05 + 0.9 * i / max(1, count - 1)) for i in range(count)]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
