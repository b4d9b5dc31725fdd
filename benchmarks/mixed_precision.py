"""Mixed precision against single formats: quality at equal bytes, by several ways of making a plan.

    python benchmarks/mixed_precision.py MODEL --sensitivity samples --tie-qkv --devices cuda:0 --processes 6 \\
        --json benchmarks/results/mixed.json --markdown docs/methods/mixed-precision.md

Every attention and feed-forward layer is compressed in every candidate, every modulation layer in every modulation
candidate; each (layer, candidate) is scored; plans are made for every budget, and for the bytes of single-format plans
("= ..." rows: mixed against single at equal size); each plan is sampled on the conditions and noise of the
full-precision model. The plan "chosen" is what `vdit-quant calibrate --budget` takes: of the plans by MILP and by joint
error, the best on samples of its own, which no other figure here is made from. Writes the JSON, the table into the
marked region of the documents named, and, where matplotlib is installed, PNG plots beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mixed_worker
import quality
import torch

import vdit_quant
from vdit_quant.calibrate import mixed
from vdit_quant.calibrate.trial import choose
from vdit_quant.evaluate.plan_plot import plot_curves, plot_plan
from vdit_quant.quantize.allocate import LayerCandidates, allocate, greedy, uniform
from vdit_quant.quantize.bit_plan import BitPlan
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.spec import LayerSpec

CANDIDATES = ",".join(f"{name}-a8tok-h64" for name in mixed.CANDIDATES)
MODULATION = ",".join(f"{name}{way}" for way in ("", "-h64") for name in mixed.CANDIDATES)
MATCHED = "wvq3+wvq3-h64,wvq3+w4g64,w4g64+w4g64,w4g64+w8,w6g64+w8"
START = time.perf_counter()
TRIED: dict[str, Callable[..., BitPlan]] = {
    "milp": partial(allocate, trust=0.0),
    "joint 0.5": partial(allocate, trust=0.5),
    "joint 1": partial(allocate, trust=1.0),
}
ALLOCATORS: dict[str, Callable[..., BitPlan]] = {"uniform": uniform, "greedy": greedy, **TRIED}


def main() -> None:
    options = arguments().parse_args()
    options.seeds = tuple(options.seed or (1, 2, 3))
    if not options.render:
        try:
            measured = run(options)
        except InputError as error:
            raise SystemExit(f"error: {error}") from None
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    found = json.loads(options.json.read_text(encoding="utf-8"))
    table = render(found)
    for document in options.markdown:
        quality.rewrite(document, options.name, table)
    print(table)
    try:
        plot(found, options.json)
    except InputError as error:
        note(f"no plots: {error}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="demo", help="pipeline folder, transformer folder, hub id, or demo")
    add("--name", default="mixed", help="name of the marked region")
    add("--markdown", type=Path, action="append", default=[], help="document with the marked region; may be repeated")
    add("--render", action="store_true", help="measure nothing; write the documents from the JSON")
    add("--budgets", default="3.0,3.5,4.0,4.5,5.0,6.0", help="average bits, or budgets such as 2.5x or 12MB")
    add("--match", default=MATCHED, help="single-format plans, CORE+MODULATION, whose bytes are budgets as well")
    add("--candidates", default=CANDIDATES, help="specs of attention and feed-forward layers")
    add("--modulation", default=MODULATION, help="specs of modulation layers; one: fixed")
    add("--method", default="viditq", help="of attention and feed-forward layers: viditq, gptq, rtn, ...")
    add("--modulation-method", default="gptq", help="of modulation layers")
    add(
        "--sensitivity",
        choices=("drift", "output", "samples"),
        default="drift",
        help="denoiser output errors added up over the steps, plain, or errors of finished samples",
    )
    add("--tie-qkv", action="store_true", help="one spec for the query, key and value of an attention")
    add("--samples", type=int, default=200, help="samples a seed")
    add("--seed", type=int, action="append", help="may be given again. Default: 1, 2 and 3")
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=1.5)
    add("--batch-size", type=int, default=200)
    add("--calibration-samples", type=int, default=32)
    add("--probe-samples", type=int, default=8, help="samples whose calls the sensitivities are measured on")
    add("--probe-steps", type=int, default=5, help="timesteps of each of them")
    add("--devices", default="cuda:0" if torch.cuda.is_available() else "cpu", help="comma-separated")
    add("--processes", type=int, default=1, help="processes a device")
    add("--limit", type=float, default=3600.0, help="seconds after which plans that are not measured are left out")
    add("--threads", type=int, default=2, help="CPU threads a process")
    add("--json", type=Path, required=True, help="where the figures are written; .md and .png go beside it")
    return parser


def note(message: str) -> None:
    print(f"[{time.perf_counter() - START:7.1f} s] {message}", flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    devices, context = options.devices.split(",") * options.processes, multiprocessing.get_context("spawn")
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    model = mixed_worker.Model(options, "cpu")
    note(f"{model.label} on {len(devices)} process(es), {len(model.offered)} layers, method {options.method}")
    with tempfile.TemporaryDirectory() as options.folder, ProcessPoolExecutor(
        len(devices), context, mixed_worker.start, (options, queue)
    ) as pool:  # fmt: skip
        table, seconds = sensitivities(model, pool, len(devices))
        errors = modulation_errors(model, table)
        rows = measure_plans(plans(model, table, options), pool, options.limit)
    return {
        "model": model.label,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {"vdit-quant": vdit_quant.__version__, "torch": torch.__version__},
        "method": f"{options.method}, modulation layers {options.modulation_method}",
        "sensitivity": options.sensitivity,
        "workload": asdict(model.workload(0)),
        "seeds": list(options.seeds),
        "sensitivity_seconds": seconds,
        "roles": {row.layer: model.roles[row.layer] for row in table},
        "shapes": {row.layer: list(model.shapes[row.layer]) for row in table},
        "blocks": model.blocks,
        "candidates": sum(len(row.candidates) for row in table),
        "modulation_errors": errors,
        "rows": rows,
    }


def sensitivities(
    model: mixed_worker.Model, pool: ProcessPoolExecutor, count: int
) -> tuple[list[LayerCandidates], float]:
    """The table, and the seconds of all processes together. Neighbouring layers go to one process."""
    size = max(1, len(model.offered) // (4 * count))
    numbers = list(range(len(model.offered)))
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    table, seconds = [], 0.0
    for number, (rows, spent) in enumerate(pool.map(mixed_worker.score, parts)):
        table += mixed_worker.unpacked(rows)
        seconds += spent
        note(f"sensitivities: {number + 1} of {len(parts)} parts")
    return table, seconds


def modulation_errors(model: mixed_worker.Model, table: list[LayerCandidates]) -> dict[str, float]:
    """Spec -> the errors of all modulation layers in it, added up."""
    out: dict[str, float] = {}
    for row in table:
        for candidate in row.candidates if model.roles[row.layer] == "modulation" else ():
            out[candidate.spec] = out.get(candidate.spec, 0.0) + candidate.error
    return out


def plans(
    model: mixed_worker.Model, table: list[LayerCandidates], options: argparse.Namespace
) -> list[tuple[str, str, BitPlan]]:
    """(budget, allocator, plan) of everything that is measured."""
    out: list[tuple[str, str, BitPlan]] = []
    singles = {
        _short(core, modulation): single(model, table, core, modulation)
        for core, modulation in product(options.candidates.split(","), options.modulation.split(","))
    }
    wanted = [(text, text) for text in options.budgets.split(",") if text]
    sizes = {name: plan.bytes for name, plan in singles.items()}
    wanted += [(f"= {name}", f"{sizes[name] / 1e3}kB") for name in options.match.split(",") if name in sizes]
    for name, budget in wanted:
        for allocator, solve in ALLOCATORS.items():
            try:
                out.append((name, allocator, solve(table, budget)))
            except InputError as error:
                note(f"{name}: {error}")
                break
    first = [row for row in out if not row[0].startswith("=")]  # what matters most is measured first
    return [*first, *((name, "single", plan) for name, plan in singles.items()), *out[len(first) :]]


def _short(core: str, modulation: str) -> str:
    return f"{core.split('-')[0]}+{modulation}"


def single(model: mixed_worker.Model, table: Sequence[LayerCandidates], core: str, modulation: str) -> BitPlan:
    """One format for the core layers, one for the modulation layers; the first that fits where it does not."""
    layers, size, weights = {}, 0, sum(row.weights for row in table)
    for row in table:
        if model.roles[row.layer] in mixed_worker.CORE:
            same = [c for c in row.candidates if LayerSpec.parse(c.spec).weight == LayerSpec.parse(core).weight]
        else:
            same = [c for c in row.candidates if c.spec == modulation]
        used = (same or list(row.candidates))[0]
        layers[row.layer], size = used.spec, size + used.bytes
    return BitPlan(layers, f"{size / 1e3}kB", size, 8 * size / weights, 0.0, solver="greedy")


def measure_plans(
    wanted: list[tuple[str, str, BitPlan]], pool: ProcessPoolExecutor, limit: float
) -> list[dict[str, Any]]:
    """A row for each plan, and for each budget the row "chosen": of the plans that are tried, the best in the trial.
    Budgets of which a plan was not measured in time are left out."""
    unique = {_key(plan): plan.layers for _, _, plan in wanted}
    running = {pool.submit(mixed_worker.measure_plan, layers): key for key, layers in unique.items()}
    found = {}
    try:
        for done in as_completed(running, timeout=max(0.0, limit - (time.perf_counter() - START))):
            found[running[done]] = done.result()
            note(f"plans: {len(found)} of {len(unique)}, {done.result().psnr:.2f} dB")
    except TimeoutError:
        note(f"{len(unique) - len(found)} plans are left out")
        pool.shutdown(wait=False, cancel_futures=True)
    late = {name for name, by, plan in wanted if by != "single" and _key(plan) not in found}
    rows = [
        {"budget": name, "allocator": by, "plan": plan.to_dict(), **asdict(found[_key(plan)])}
        for name, by, plan in wanted
        if name not in late and _key(plan) in found
    ]
    for name in dict.fromkeys(row["budget"] for row in rows if row["allocator"] in TRIED):
        tried = [row for row in rows if row["budget"] == name and row["allocator"] in TRIED]
        rows.append({**tried[choose([torch.tensor(row["trial"]) for row in tried])], "allocator": "chosen"})
    return rows


def _key(plan: BitPlan) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(plan.layers.items()))


def render(found: dict[str, Any]) -> str:
    """One line for each budget, with the settings that the figures depend on; then the single formats."""
    w, rows = found["workload"], found["rows"]
    text = (
        f"Model `{found['model']}`, {found['method']}, {w['samples']} samples a seed (seeds "
        f"{', '.join(map(str, found['seeds']))}), {w['steps']} steps, guidance {w['guidance_scale']}, fp32 against the "
        f"full-precision model. {found['device']}, torch {found['versions']['torch']}. Sensitivities of "
        f"{found['candidates']} (layer, candidate) pairs in {found['sensitivity_seconds']:.0f} s "
        f"({found['sensitivity']}; compression included; all processes added up)."
    )
    heads = ["chosen plan", "milp", "joint 0.5", "joint 1", "greedy", "uniform", "next single format"]
    out = [text, "", "PSNR in dB, bits a weight in brackets.", ""]
    out += [f"| budget | {' | '.join(heads)} | chosen plan's specs |", "|---|" + "---:|" * len(heads) + "---|"]
    by = {(row["budget"], row["allocator"]): row for row in rows}
    singles = frontier([row for row in rows if row["allocator"] == "single"])
    for name in dict.fromkeys(row["budget"] for row in rows if row["allocator"] == "chosen"):
        chosen = by[name, "chosen"]
        larger = [row for row in singles if row["plan"]["bytes"] >= chosen["plan"]["bytes"]]
        cells = [f"**{chosen['psnr']:.2f}** ({chosen['plan']['bits']:.3f})"]
        cells += [_cell(by[name, key]) for key in ("milp", "joint 0.5", "joint 1", "greedy", "uniform")]
        cells.append(f"{_cell(larger[0])} {larger[0]['budget']}" if larger else "")
        out.append(f"| {name} | {' | '.join(cells)} | {_counts(chosen['plan'])} |")
    out += ["", "| single format | bits | ratio | PSNR, dB |", "|---|---:|---:|---:|"]
    for row in sorted((r for r in rows if r["allocator"] == "single"), key=lambda r: float(r["plan"]["bytes"])):
        bits = row["plan"]["bits"]
        out.append(f"| {row['budget']} | {bits:.3f} | {16 / bits:.2f}x | {row['psnr']:.2f} |")
    out += ["", "| modulation layers as | their errors, added up |", "|---|---:|"]
    out += [f"| `{spec}` | {error:.1e} |" for spec, error in sorted(found["modulation_errors"].items())]
    return "\n".join(out)


def frontier(singles: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The single-format rows by bytes, without those that a smaller one is as good as."""
    best: list[dict[str, Any]] = []
    for row in sorted(singles, key=lambda r: (r["plan"]["bytes"], -r["psnr"])):
        if not best or row["psnr"] > best[-1]["psnr"]:
            best.append(row)
    return best


def _cell(row: dict[str, Any]) -> str:
    return f"{row['psnr']:.2f} ({row['plan']['bits']:.3f})"


def _counts(plan: dict[str, Any]) -> str:
    specs = [spec.split("-")[0] for spec in plan["layers"].values()]
    return ", ".join(f"{specs.count(spec)} {spec}" for spec in sorted(set(specs)))


def plot(found: dict[str, Any], target: Path) -> None:
    """PSNR and error curves, and the chosen plan nearest to 4.5 bits. Raises InputError without matplotlib."""
    for label, key, name in (
        ("PSNR, dB", "psnr", "psnr"),
        ("relative squared error on the probe", "probe_error", "error"),
    ):
        curves: dict[str, list[tuple[float, float]]] = {}
        shown = [row for row in found["rows"] if row["allocator"] in ("chosen", "milp", "greedy")]
        for row in shown + frontier([row for row in found["rows"] if row["allocator"] == "single"]):
            curves.setdefault(row["allocator"], []).append((row["plan"]["bits"], row[key]))
        curves = {allocator: sorted(set(points)) for allocator, points in curves.items()}
        plot_curves(curves, target.with_name(f"{target.stem}-{name}.png"), label, log=key != "psnr")
    plans = [BitPlan.from_dict(row["plan"]) for row in found["rows"] if row["allocator"] == "chosen"]
    if plans:
        shapes = {name: (n, k) for name, (n, k) in found["shapes"].items()}
        chosen = min(plans, key=lambda plan: abs(plan.bits - 4.5))
        plot_plan(chosen, found["roles"], shapes, found["blocks"], target.with_name(f"{target.stem}-plan.png"))


if __name__ == "__main__":
    main()
