"""How the speed-up changes with the batch (DiT-XL/2) and with the number of tokens (PixArt-Sigma), bf16 against ours.

    python benchmarks/scaling.py [--quick]          measure; write benchmarks/results/scaling.json
    python benchmarks/scaling.py --render --markdown docs/benchmarks.md --plot docs/images/scaling.png

Both sides run as one CUDA graph of the whole forward. bf16 is compiled block by block, once for each shape (the blocks
of a model share one compilation, so eleven shapes take minutes, not an hour), with torch's own choice of attention
kernel and with cuDNN's; the faster counts. Whole-model compilation is in denoiser.py, at two of these shapes. Errors
are checked as there. The table replaces what stands between `<!-- scaling:begin -->` and `<!-- scaling:end -->`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import random_models
import torch
from _render import plot_lines, rewrite, setting, table, versions
from denoiser_tables import disagreeing, escape, ratio
from denoiser_ways import CUDNN, Bench, Path_, attention, bytes_of, compile_blocks, relative, release, time_paths
from random_models import Shape
from torch import Tensor
from torch._functorch import config as functorch_config

from vdit_quant.runtime.fusion import fuse
from vdit_quant.runtime.graphs import replay_graphs

BASELINES = ("bf16", "bf16-cudnn")
RECIPES = ("w8a8", "w4a8")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIDES = (16, 32, 64, 128)  # tokens a side
TITLES = {"batch": "DiT-XL/2, 256 tokens: batch", "tokens": "PixArt-Sigma, batch 2: tokens"}


def main() -> None:
    options = arguments().parse_args()
    if options.render:
        found = json.loads(options.json.read_text(encoding="utf-8"))
    else:
        found = benchmark(options)
    text = render(found)
    if options.plot is not None:
        plot_lines(curves(found), "times as fast as compiled bf16", options.plot)
    for document in options.markdown:
        picture = options.plot and ("Curves: the same ratios against the batch and the number of tokens", options.plot)
        rewrite(document, "scaling", text, picture)
    print(text)
    if wrong := [f"{p['axis']} {p['x']} {way}" for p in found["points"] for way in disagreeing(p)]:
        raise SystemExit(f"farther from its unfused reference than twice bf16's own error: {', '.join(wrong)}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="two batches and two numbers of tokens")
    add("--rounds", type=int, default=3, help="rounds of ten forwards, each in a new order")
    add("--json", type=Path, default=Path("benchmarks/results/scaling.json"))
    add("--markdown", type=Path, action="append", default=[], help="document with the marked region; may be repeated")
    add("--plot", type=Path, help="PNG to draw; needs matplotlib")
    add("--render", action="store_true", help="measure nothing; table and plot from the JSON")
    return parser


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every point and writes the JSON after each."""
    functorch_config.enable_autograd_cache = False  # as in denoiser.py
    batches, sides = ((2, 32), (16, 32)) if options.quick else (BATCHES, SIDES)
    work = [("batch", batch, random_models.dit_xl(), batch) for batch in batches]
    work += [("tokens", side * side, random_models.pixart_sigma(2 * side), 2) for side in sides]
    points: list[dict[str, Any]] = []
    found = {"machine": torch.cuda.get_device_name(), "versions": versions(), "forwards": 10 * options.rounds}
    found["points"] = points
    for axis, x, shape, batch in work:
        start = time.perf_counter()
        points.append({"axis": axis, "x": x, **measure(shape, batch, options.rounds)})
        shown = {name: round(row["ms"], 3) for name, row in points[-1]["rows"].items()}
        print(f"{axis} {x}: {shown} ms, measured in {time.perf_counter() - start:.0f} s", flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def measure(shape: Shape, batch: int, rounds: int) -> dict[str, Any]:
    """Every way at one shape."""
    bench = Bench.of(shape, batch)
    paths, failed = [], {}
    for way in (*BASELINES, *RECIPES):
        try:
            paths.append(prepare_baseline(bench, way) if way in BASELINES else prepare_ours(bench, way))
        except Exception as error:  # one way that fails must not lose the others
            failed[way] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            print(f"{way}: {failed[way]}", flush=True)
    result = {"rows": time_paths(paths, rounds), "failed": failed, "bf16_error": bench.bf16_error}
    del paths, bench
    release()
    return result


@torch.no_grad()
def prepare_baseline(bench: Bench, way: str) -> Path_:
    """bf16 with compiled blocks, captured."""
    module = replay_graphs(compile_blocks(copy.deepcopy(bench.base), fullgraph=True))
    with attention(CUDNN if way.endswith("cudnn") else None):
        out = module(**bench.arguments)[0]
    return path(bench, way, module, {"error": relative(out, bench.truth)})


@torch.no_grad()
def prepare_ours(bench: Bench, way: str) -> Path_:
    original, own = bench.unfused(way)
    module = replay_graphs(fuse(copy.deepcopy(original)))
    out = module(**bench.arguments)[0]
    checks = {"from_unfused": relative(out, own), "allowed": bench.allowed(way)}
    return path(bench, way, module, {"error": relative(out, bench.truth), **checks})


def path(bench: Bench, way: str, module: Any, found: dict[str, Any]) -> Path_:
    """Raises RuntimeError when the forward was not captured: it would be timed with its launches."""
    if module.forward.__self__.captures != 1:
        raise RuntimeError("the forward was not captured in a CUDA graph")
    call = torch.no_grad()(partial(replay, module, bench.arguments))
    return Path_(way, module, call, {**found, "weight_bytes": bytes_of(module)})


def replay(module: Any, arguments: dict[str, Any]) -> Tensor:
    return module(**arguments)[0]


def baseline(point: dict[str, Any]) -> float | None:
    return min((point["rows"][way]["ms"] for way in BASELINES if way in point["rows"]), default=None)


def curves(found: dict[str, Any]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of an axis -> recipe -> (x, times as fast as bf16)."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for point in found["points"]:
        best = baseline(point)
        for recipe in RECIPES:
            if best is not None and recipe in point["rows"]:
                series = panels.setdefault(TITLES[point["axis"]], {}).setdefault(recipe, [])
                series.append((point["x"], best / point["rows"][recipe]["ms"]))
    return panels


def render(found: dict[str, Any]) -> str:
    """One table an axis, with what the figures depend on."""
    lines = [
        f"{setting(found)}. Random weights, one process, medians of {found['forwards']} forwards in rounds of shuffled "
        "order. Both sides are one CUDA graph of the whole forward; bf16 has compiled blocks and the faster of torch's "
        "own choice of attention kernel and cuDNN's.",
        "",
    ]
    for axis, title in TITLES.items():
        rows, failed = [], []
        for point in (p for p in found["points"] if p["axis"] == axis):
            best = baseline(point)
            cells = ["-" if best is None else f"{best:.2f}"]
            for recipe in RECIPES:
                row = point["rows"].get(recipe)
                wrong = " (too far from unfused)" if recipe in disagreeing(point) else ""
                cells += ["failed", "-"] if row is None else [f"{row['ms']:.2f}", ratio(best, row["ms"]) + wrong]
            rows.append([point["x"], *cells])
            failed += [f"- {axis} {point['x']}, `{way}`: {escape(why)}" for way, why in point["failed"].items()]
        head = [axis, "bf16, ms", *(cell for recipe in RECIPES for cell in (f"{recipe}, ms", f"{recipe}, x bf16"))]
        lines += [f"**{title}**", "", *table(head, rows), "", *failed, *([""] if failed else [])]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    main()
