"""What the benchmarks share to publish their figures: marked regions of a document, tables, captions and plots."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Series = Mapping[str, Sequence[tuple[float, float]]]


def rewrite(document: Path, name: str, text: str, plot: tuple[str, Path] | None = None) -> None:
    """Replaces what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` by `text` and the picture `plot`, its
    description and its file. Raises SystemExit without the marks."""
    if plot is not None:
        text += f"\n\n![{plot[0]}]({Path(os.path.relpath(plot[1], document.parent)).as_posix()})"
    begin, end, old = check_document(document, name)
    before, rest = old.split(begin)
    document.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def check_document(document: Path, name: str) -> tuple[str, str, str]:
    """Both marks of a region, and the document's text: the marks alone where there is no such file. Raises SystemExit
    for a document without them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = document.read_text(encoding="utf-8") if document.exists() else f"{begin}\n{end}\n"
    if old.count(begin) != 1 or old.count(end) != 1:
        raise SystemExit(f"{document}: expected one {begin} ... {end}")
    return begin, end, old


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table: the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def versions() -> dict[str, str]:
    """Versions of what can decide a figure; what is not installed is left out."""
    found = {}
    for name in ("vdit-quant", "torch", "triton", "diffusers", "torchao", "bitsandbytes"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def setting(found: Mapping[str, Any]) -> str:
    """ "MACHINE; NAME VERSION, ..." of a result."""
    return f"{found['machine']}; " + ", ".join(f"{name} {version}" for name, version in found["versions"].items())


def plot_bars(groups: Mapping[str, Mapping[str, float]], marks: Mapping[str, float], label: str, path: Path) -> None:
    """Writes a PNG with one panel of horizontal bars for each group, first bar on top.

    groups  title -> name -> value
    marks   title -> value of a second reference line beside the one at 1
    """
    figure, axes = _figure(len(groups), (7.0, 0.5 + sum(0.6 + 0.2 * len(bars) for bars in groups.values())), groups)
    for panel, (title, bars) in zip(axes, groups.items(), strict=True):
        peers = ("torchao", "bitsandbytes")
        ours = ["#888888" if n.startswith("bf16") else "#c9a227" if n.startswith(peers) else "#3b7dd8" for n in bars]
        panel.barh(list(bars), list(bars.values()), color=ours)
        panel.bar_label(panel.containers[0], fmt="%.2f", fontsize=7, padding=2)
        panel.invert_yaxis()
        panel.axvline(1, color="black", linewidth=0.8)
        if title in marks:
            panel.axvline(marks[title], color="black", linewidth=0.8, linestyle="--")
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.margins(x=0.08)
    axes[-1].set_xlabel(label, fontsize=8)
    _save(figure, path)


def plot_lines(panels: Mapping[str, Series], label: str, path: Path) -> None:
    """Writes a PNG with one panel for each title: x on a logarithmic axis of base 2, a line at 1."""
    figure, axes = _figure(len(panels), (6.4, 3.0 * len(panels)), panels)
    for panel, (title, series) in zip(axes, panels.items(), strict=True):
        for name, points in series.items():
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        ticks = sorted({x for points in series.values() for x, _ in points})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xlabel(title, fontsize=9)
        panel.set_ylabel(label, fontsize=8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    _save(figure, path)


def _figure(rows: int, size: tuple[float, float], groups: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("plots need matplotlib; install it with: pip install '.[plot]'") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [3 + len(group) for group in groups.values()]
    return figure, list(figure.subplots(rows, 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0])


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
