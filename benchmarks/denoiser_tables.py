"""Tables and pictures of what `denoiser.py` has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _render import plot_bars, setting, table
from denoiser_ways import COARSE


def baselines(model: dict[str, Any]) -> tuple[float | None, float | None]:
    """ms of the fastest compiled bf16: without CUDA graphs, and of all where graphs were measured too."""
    compiled = {name: row["ms"] for name, row in model["rows"].items() if name.startswith("bf16-compiled")}
    plain = min((ms for name, ms in compiled.items() if not name.endswith("graph")), default=None)
    return plain, min(compiled.values()) if any(name.endswith("graph") for name in compiled) else None


def disagreeing(model: dict[str, Any]) -> list[str]:
    """The fused ways that are too far from their unfused references."""
    return [
        name for name, row in model["rows"].items() if "allowed" in row and not row["from_unfused"] <= row["allowed"]
    ]


def own_errors(model: dict[str, Any]) -> dict[str, float]:
    """Ways that are held against bf16's error with their own weights, and that error."""
    rows = {
        name: row["allowed"] / 2
        for name, row in model["rows"].items()
        if name.removesuffix("-graph") in COARSE and "allowed" in row
    }
    return {name: error for name, error in rows.items() if error != model["bf16_error"]}


def caption(model: dict[str, Any]) -> str:
    return (
        f"{setting(model)}. Random weights, one process, medians of {model['forwards']} forwards in rounds of shuffled "
        "order. The baseline is the faster of bf16 `torch.compile` with torch's own choice of attention kernel and "
        "with cuDNN's first; the second ratio lets it use CUDA graphs too."
    )


def render(found: dict[str, Any]) -> str:
    """One table a model, with what its figures depend on."""
    captions = list(dict.fromkeys(caption(model) for model in found["models"].values()))
    lines = [captions[0], ""] if len(captions) == 1 else []
    for model in found["models"].values():
        lines += [f"**{model['label']}**", ""]
        if len(captions) > 1:
            lines += [caption(model), ""]
        lines += [*model_table(model), ""]
        lines += [f"bf16's own error is {model['bf16_error']:.4f}: a fused way may be twice as far from unfused."]
        lines += [f"`{name}`: {error:.4f} with its own weights." for name, error in own_errors(model).items()]
        lines += [""]
        lines += [f"- `{way}` failed: {escape(reason)}" for way, reason in model["failed"].items()]
        lines += [""] if model["failed"] else []
    return "\n".join(lines).rstrip()


def summary(found: dict[str, Any]) -> str:
    """One line a model: times as fast as compiled bf16, which has CUDA graphs too where it was measured with them."""
    recipes = ("w8a8", "w4a8")
    rows = []
    for model in found["models"].values():
        plain, graphed = baselines(model)
        times = [model["rows"].get(f"{recipe}-graph", {}).get("ms") for recipe in recipes]
        if None not in times:
            label = model["label"] + (", CUDA graphs on both sides" if graphed else "")
            rows.append([label, *(f"{ratio(graphed or plain, ms)}x" for ms in times)])
    machine = next(iter(found["models"].values()))["machine"]
    return "\n".join([f"{machine}, random weights:", "", *table(["", *(r.upper() for r in recipes)], rows)])


def model_table(model: dict[str, Any]) -> list[str]:
    plain, graphed = baselines(model)
    wrong = disagreeing(model)
    rows = []
    for name, row in model["rows"].items():
        distance = f"{row['from_unfused']:.4f}" if "from_unfused" in row else ""
        cells = [name, f"{row['ms']:.2f}", ratio(plain, row["ms"]), ratio(graphed, row["ms"])]
        cells += ["-" if row[key] is None else f"{row[key] / 1e9:.2f}" for key in ("weight_bytes", "peak_bytes")]
        cells += [f"{row['error']:.4f}", f"**{distance}**, too far" if name in wrong else distance]
        rows.append([*cells, row["attention"], f"{row['first_call_s']:.1f}"])
    head = ["", "ms", "x compiled bf16", "x compiled bf16 with graphs", "weights, GB", "peak, GB", "error"]
    return table([*head, "from unfused", "attention", "first call, s"], rows)


def ratio(baseline: float | None, ms: float) -> str:
    return "-" if baseline is None else f"{baseline / ms:.2f}"


def escape(reason: str) -> str:
    """Text of an error on one line of Markdown."""
    return "`" + reason.replace("`", "'")[:160].strip() + "`"


def plot(found: dict[str, Any], path: Path) -> None:
    """Bars of how many times as fast as the fastest compiled bf16 each way is; dashed: that without CUDA graphs."""
    groups, marks = {}, {}
    for model in found["models"].values():
        plain, graphed = baselines(model)
        if plain is None:
            continue
        base = graphed or plain
        groups[model["label"]] = {name: base / row["ms"] for name, row in model["rows"].items()}
        if base != plain:
            marks[model["label"]] = base / plain
    if not groups:
        raise SystemExit("nothing to plot: no model was measured with compiled bf16")
    plot_bars(groups, marks, "times as fast as the fastest compiled bf16 (dashed: that without CUDA graphs)", path)
