"""Pictures of a pruning run: the loss of search and recovery, and which blocks stayed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .plan import PrunePlan

_SPARK = "▁▂▃▄▅▆▇█"

Histories = Mapping[str, Sequence[Mapping[str, float]]]


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot_run(histories: Histories, plan: PrunePlan, path: Path) -> None:
    """Writes a PNG: one panel a stage with every part of its loss over the steps, and the plan below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {stage: history for stage, history in histories.items() if history}
    rows = len(shown) + 1
    figure = Figure(figsize=(7.2, 2.6 * len(shown) + 0.5 + 0.7 * len(plan.stacks)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [2.6] * len(shown) + [0.5 + 0.7 * len(plan.stacks)]
    axes = list(figure.subplots(rows, 1, squeeze=False, height_ratios=heights)[:, 0])
    for panel, (stage, history) in zip(axes, shown.items(), strict=False):
        _draw_losses(panel, stage, history)
    _draw_plan(axes[-1], plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def _draw_losses(axes: Any, stage: str, history: Sequence[Mapping[str, float]]) -> None:
    steps = [entry["step"] for entry in history]
    for part in history[0]:
        if part not in ("step", "lr", "norm", "seconds", "undecided"):
            axes.plot(steps, [entry[part] for entry in history], label=part, linewidth=1.6 if part == "loss" else 0.9)
    axes.set_yscale("log")
    axes.set_ylabel("loss")
    axes.set_xlabel(f"{stage}: step")
    axes.grid(alpha=0.3)
    handles = list(axes.get_lines())
    if "undecided" in history[0]:
        right = axes.twinx()
        handles += right.plot(steps, [e["undecided"] for e in history], "k:", linewidth=1, label="undecided (right)")
        right.set_ylim(0, 1.05)
    axes.legend(handles=handles, fontsize=8)


def _draw_plan(axes: Any, plan: PrunePlan) -> None:
    for row, stack in enumerate(plan.stacks):
        for index in range(stack.depth):
            stays = index in stack.kept
            axes.barh(-row, 0.9, left=index - 0.45, height=0.7, color="tab:blue" if stays else "0.88")
            axes.text(index, -row, str(index), ha="center", va="center", fontsize=7, color="w" if stays else "0.5")
    axes.set_yticks([-row for row in range(len(plan.stacks))], [stack.name for stack in plan.stacks], fontsize=8)
    axes.set_xticks([])
    axes.set_title(f"blocks kept ({plan.criterion})", fontsize=9)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """A line of `width` bars for positive values, on a logarithmic scale."""
    cells = min(width, len(values))
    picked = [values[(i * (len(values) - 1)) // max(1, cells - 1)] for i in range(cells)]
    logs = [math.log(max(v, 1e-12)) for v in picked]
    low, span = min(logs), max(max(logs) - min(logs), 1e-9)
    return "".join(_SPARK[min(7, int(8 * (v - low) / span))] for v in logs)
