"""Everything below W4A8 on one model: paired PSNR, Frechet distance, bits and bytes, several GPUs at once.

    python benchmarks/low_bit.py MODEL --yardstick FOLDER --devices cuda:0,cuda:1,cuda:2,cuda:3 --processes 2 \\
        --json benchmarks/results/low-bit.json --markdown docs/results.md --markdown docs/methods/hqdit.md \\
        --markdown docs/methods/svdquant.md --markdown docs/methods/vq4dit.md

Each row is a method and a spec for the attention and feed-forward layers, by one process of its own; a row that fails
keeps its error and stops no other. The JSON is written after every row. Each table is written from it into
the documents that hold its mark; `--render` does this alone. `--rows` takes globs over the rows' names, `--list` prints
them. Many processes on one GPU take turns and are slower than few. Bits a weight count every scale, sign, codebook and
low-rank branch. Without `--yardstick`, distances measured before are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import statistics
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import frechet
import low_bit_rows
import quality
import torch

import vdit_quant
from vdit_quant.evaluate.compare import Run, compare_runs, sample_seeds
from vdit_quant.evaluate.sampling import Workload
from vdit_quant.quantize.recipe import CORE_ROLES, Recipe
from vdit_quant.runtime.describe import describe_artifact

_baselines: dict[str, Run] = {}
BROKEN = 3
"""Exit status of a process whose GPU context is lost."""


@dataclass(frozen=True)
class Job:
    """What a process needs for one row; plain values, because they cross processes."""

    name: str
    model: str
    device: str
    samples: int
    steps: int
    seeds: tuple[int, ...]
    guidance: float
    yardstick: str | None
    frechet_samples: int
    row: dict[str, Any] = field(hash=False)


def main() -> None:
    options = arguments().parse_args()
    rows = {name: row for name, row in low_bit_rows.ROWS.items() if selected(name, options.rows)}
    if options.list:
        print("\n".join(f"{name:34} {row['method']:9} {row['spec']:20} {row['params']}" for name, row in rows.items()))
        return
    if not options.render:
        measure_all(options, rows)
    if not options.json.exists():
        raise SystemExit(f"{options.json}: no such file; measure first")
    found = json.loads(options.json.read_text(encoding="utf-8"))
    measured = {row["table"] for row in found["rows"]}
    for title in [title for title in low_bit_rows.TABLES if title in measured]:
        table = render(found, title)
        for document in options.markdown:
            if f"<!-- quality:{title}:begin -->" in document.read_text(encoding="utf-8"):
                quality.rewrite(document, title, table)
        print(f"\n{title}\n\n{table}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="demo", help="pipeline folder")
    add("--rows", action="append", help="glob over the names of rows; may be given again. Default: all but explore-*")
    add("--list", action="store_true", help="print the rows and stop")
    add("--devices", default="cpu", help="comma-separated")
    add("--processes", type=int, default=1, help="processes a device")
    add("--samples", type=int, default=200, help="samples a seed")
    add("--seeds", default="1,2,3")
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=1.5)
    add("--yardstick", type=Path, help="folder with cifar_fd.py, see frechet.py; no distances without it")
    add("--frechet-samples", type=int, default=5000, help="for rows that have a distance; 50 steps")
    add("--limit", type=float, default=510.0, help="seconds after which no more is waited for")
    add("--json", type=Path, required=True)
    add("--markdown", type=Path, action="append", default=[])
    add("--render", action="store_true", help="measure nothing; write the documents from the JSON")
    return parser


def selected(name: str, globs: list[str] | None) -> bool:
    if globs is None:
        return not name.startswith("explore-")
    return any(fnmatchcase(name, pattern) for pattern in globs)


def urgency(item: tuple[str, dict[str, Any]]) -> tuple[int, int]:
    """Table by table, and the longest rows of each first."""
    _, row = item
    return low_bit_rows.TABLES.index(row["table"]), -row["params"].get("steps", 0)


def measure_all(options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Runs every row and writes the JSON after each."""
    begin, devices = time.perf_counter(), options.devices.split(",")
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    seeds = tuple(int(s) for s in options.seeds.split(","))
    yardstick = None if options.yardstick is None else str(options.yardstick)
    for name, row in sorted(rows.items(), key=urgency):
        shared = (options.samples, options.steps, seeds, options.guidance, yardstick, options.frechet_samples)
        todo.put(Job(name, options.model, "", *shared, row))

    def start(number: int) -> Any:
        worker = context.Process(target=work, args=(devices[number % len(devices)], todo, done), daemon=True)
        worker.start()
        return worker

    workers = [start(number) for number in range(min(len(rows), len(devices) * options.processes))]
    results: dict[str, Any] = {}
    while len(results) < len(rows) and any(w.is_alive() for w in workers):
        # one that a GPU error has ended is no use for the rows behind: another takes its place
        workers = [start(n) if w.exitcode == BROKEN else w for n, w in enumerate(workers)]
        left = options.limit - (time.perf_counter() - begin)
        if left <= 0:
            break
        try:
            row = done.get(timeout=min(left, 5.0))
        except queue.Empty:
            continue
        results[row["name"]] = row
        shown = row["error"].rstrip() if "error" in row else f"{row['psnr'] or 0:.2f} dB, {row['core_bits']:.3f} bits"
        distance = f", FD {row['frechet']:.3f}" if row.get("frechet") is not None else ""
        print(f"{time.perf_counter() - begin:5.0f} s  {row['name']:34} {shown}{distance}", flush=True)
        write(options, results, rows)
    for worker in workers:
        worker.terminate()
    missing = [name for name in rows if name not in results]
    print(f"{time.perf_counter() - begin:.0f} s for {len(results)} rows; not finished: {missing}", flush=True)
    write(options, results, rows)


def write(options: argparse.Namespace, results: dict[str, Any], rows: dict[str, Any]) -> None:
    before = json.loads(options.json.read_text(encoding="utf-8"))["rows"] if options.json.exists() else []
    kept = {row["name"]: row for row in before}
    for name, row in results.items():
        if "error" not in row or "error" in kept.get(name, row):  # a failure replaces no figure
            distance = {} if options.yardstick else {k: v for k, v in kept.get(name, {}).items() if k == "frechet"}
            kept[name] = {**distance, **row}
    found = {
        "model": Path(options.model).name,
        "machine": quality.machine(options.devices.split(",")[0]),
        "versions": {"vdit-quant": vdit_quant.__version__, "torch": torch.__version__},
        "workload": {"samples": options.samples, "steps": options.steps, "guidance_scale": options.guidance},
        "seeds": [int(s) for s in options.seeds.split(",")],
        "sampler": "DDIMScheduler",
        "dtype": "float32",
        "frechet_samples": options.frechet_samples,
        "rows": [kept[name] for name in low_bit_rows.ROWS if name in kept],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.json.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.json)


def work(device: str, todo: Any, done: Any) -> None:
    """A process: takes rows until there are none."""
    torch.set_num_threads(2)
    while True:
        try:
            job = todo.get(timeout=2.0)
        except queue.Empty:
            return
        try:
            done.put(measure_row(Job(**{**asdict(job), "device": device})))
        except Exception as error:
            done.put({"name": job.name, "error": traceback.format_exc(limit=-4), **job.row})
            if isinstance(error, torch.AcceleratorError):  # every later call of this process would fail too
                done.close()
                done.join_thread()
                raise SystemExit(BROKEN) from None


def measure_row(job: Job) -> dict[str, Any]:
    workload = Workload(job.samples, job.steps, 0, job.guidance, job.samples, dtype="float32")
    if job.device not in _baselines:
        _baselines[job.device] = sample_seeds(job.model, workload, job.seeds, job.device)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        settings = {"guidance": job.guidance, "dtype": "float32", "device": job.device}
        if job.row["method"] == "none":
            artifact: Path = Path(job.model)
        else:
            recipe = Recipe.from_dict(recipe_of(job), job.name)
            artifact = vdit_quant.compress(job.model, Path(folder) / "artifact", recipe=recipe, **settings)
        seconds = time.perf_counter() - start
        found: dict[str, Any] = {"name": job.name, **job.row, "calibration_seconds": seconds}
        run = sample_seeds(artifact, workload, job.seeds, job.device)
        if job.row["method"] != "none":
            result = compare_runs(run, _baselines[job.device])
            found |= {"psnr": result.psnr, "psnr_spread": result.psnr_spread, "ssim": result.ssim, **sizes(artifact)}
            found["by_seed"] = [seed.psnr for seed in result.seeds]
        else:
            found |= {
                "psnr": None,
                "psnr_spread": 0.0,
                "ssim": 1.0,
                "core_bits": 16.0,
                "bits": 16.0,
                "bytes": run.bytes,
            }
        if job.yardstick is not None and job.row["distance"]:
            long = Workload(job.frechet_samples, 50, 1, job.guidance, min(1000, job.frechet_samples), dtype="float32")
            yardstick = frechet.load_yardstick(Path(job.yardstick))
            found["frechet"] = frechet.measure(job.name, artifact, long, yardstick, job.device)["distance"]
        if torch.device(job.device).type == "cuda":
            found["peak_gb"] = torch.cuda.max_memory_allocated(job.device) / 1e9
    return found


def recipe_of(job: Job) -> dict[str, Any]:
    """The row as a recipe: its method on the core layers, and 8-bit modulation unless the row says otherwise."""
    row = job.row
    core = {"method": row["method"], "spec": row["spec"], "params": row["params"]}
    modulation = row.get("modulation") or {"method": "gptq", "spec": "w8", "params": {}}
    if row["method"] in ("rtn", "nf4") and not row.get("modulation"):
        modulation = {"method": "rtn", "spec": "w8", "params": {}}
    return {
        "name": job.name,
        "step": [{**core, "roles": list(CORE_ROLES)}, {**modulation, "roles": ["modulation"]}],
    }


def sizes(artifact: Path) -> dict[str, Any]:
    """Bits a weight of the core layers and of all compressed ones, and the bytes of these."""
    inside = describe_artifact(artifact, "cpu")
    core = [row for row in inside["layers"] if "norm" not in row["pattern"]]
    weights = sum(8 * row["bytes"] / row["bits_per_weight"] for row in core)
    return {
        "core_bits": 8 * sum(row["bytes"] for row in core) / weights,
        "bits": 16 * inside["ratio"],
        "bytes": inside["compressed_bytes"],
    }


def render(found: dict[str, Any], title: str) -> str:
    """One of the tables, from the JSON alone."""
    rows = [row for row in found["rows"] if row["table"] == title]
    shows_distance = any(row.get("frechet") is not None for row in rows)
    out = [
        "| | spec | PSNR, dB | SSIM | bits a core weight | all compressed |" + (" FD |" if shows_distance else ""),
        "|---|---|---:|---:|---:|---:|" + ("---:|" if shows_distance else ""),
    ]
    for row in rows:
        if "error" in row:
            out.append(f"| {row['label']} | `{row['spec']}` | failed | | | |" + (" |" if shows_distance else ""))
            continue
        full = row["method"] == "none"
        psnr = "" if full else f"{row['psnr']:.2f} ± {row['psnr_spread']:.2f}"
        cells = [
            row["label"],
            "" if full else f"`{row['spec']}`",
            psnr,
            f"{row['ssim']:.4f}",
            f"{row['core_bits']:.2f}",
        ]
        cells.append(f"{row['bits']:.2f}")
        if shows_distance:
            cells.append(f"{row['frechet']:.3f}" if row.get("frechet") is not None else "")
        out.append("| " + " | ".join(cells) + " |")
    text = quality.caption(found)
    if shows_distance:
        text += f" FD: Frechet distance, {found['frechet_samples']:,} samples, 50 steps, seed 1."
    spread = [row["calibration_seconds"] for row in rows if "error" not in row]
    if spread:
        text += f" Calibrated in {statistics.median(spread):.0f} s (median), several at a time."
    return "\n".join([text, "", *out])


if __name__ == "__main__":
    main()
