"""Depth pruning with recovery: every criterion on the same recovery budget, distillation against fine-tuning, and the
headline models with their speed, their size and what is left of them in four bits.

    python benchmarks/pruning.py MODEL --yardstick FOLDER --json OUT [--devices 0,1,2,3] [--markdown DOC]

One process a row. The first device runs the headline alone, so that its times mean something; the others run several
rows each. Training data is sampled by the teacher once and shared. A row's figures are on disk as soon as it ends, and
a row that fails or does not end in time costs nothing but itself. `--smoke` runs every row for a few steps.
FOLDER is a yardstick as in `frechet.py`. `--render` writes the documents again from the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import frechet
import quality
from safetensors import SafetensorError

import vdit_quant

HEADLINE = "learned-6"
PACE = "teacher"  # measures full depth, and how long a training step takes, from which the rows' steps follow
SMOKE = {
    "search": "3", "recover": "6", "recover_more": "4", "row_steps": 3, "row_batch": 4, "latents": 32,
    "latent_steps": 2, "samples": 16, "steps": 2, "limit": 3600.0,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model: `options` of `prune_model` beside those all rows share.

    after   rows whose data or plan it uses; `plan`: the one whose plan it takes
    full    also timed, and compressed to four bits
    weight  slots of a device that it takes
    """

    name: str
    label: str
    table: str
    options: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    plan: str | None = None
    full: bool = False
    weight: int = 1


def rows(options: argparse.Namespace) -> list[Row]:
    """Every row, in the order in which they are started."""
    keep, more = options.keep, options.keep_more
    same = {"keep": keep, "recover": str(options.row_steps), "batch_size": options.row_batch, "compile": False}
    long = {"recover": options.recover, "search": options.search}
    found = [Row(HEADLINE, f"learned, {keep} blocks", "headline", {"keep": keep, **long}, full=True)]
    tried = {**same, "criterion": "even", "recover": "80", "samples": 512, "steps": 2, "cache": None}
    found.append(Row(PACE, "full depth", "headline", tried))
    searched = {"keep": keep, "recover": "0", "search": options.search, "seed": 1}
    found.append(Row("search-1", "search, seed 1", "search", searched, (HEADLINE, PACE), weight=3))
    nine = {"keep": more, **long, "recover": options.recover_more}
    found.append(Row("learned-9", f"learned, {more} blocks", "headline", nine, (HEADLINE, PACE), weight=options.slots))
    plans = {0: HEADLINE, 1: "search-1"}
    for seed in plans:
        for criterion in ("even", "block_influence", "sensitivity", *(("relative_error", "magnitude") * (seed == 0))):
            chosen = {**same, "criterion": criterion, "seed": seed}
            found.append(Row(f"{criterion}-{seed}", criterion, "criteria", chosen, (HEADLINE, PACE)))
    for seed, plan in plans.items():
        base = {**same, "seed": seed}
        found += [
            Row(f"learned-{seed}", "learned", "criteria", base, (plan, PACE), plan),
            Row(f"fine-tuning-{seed}", "fine-tuning", "ablation", {**base, "distill": "none"}, (plan, PACE), plan),
            Row(f"output-{seed}", "output distillation", "ablation", {**base, "distill": "output"}, (plan, PACE), plan),
            Row(
                f"unmasked-{seed}",
                "feature distillation, no mask",
                "ablation",
                {**base, "mask": None},
                (plan, PACE),
                plan,
            ),
        ]
    guided = {**same, "guidance": options.guidance, "cache": None}
    found.append(Row("guided-0", "data sampled with guidance", "ablation", guided, (HEADLINE, PACE), HEADLINE))
    chosen = set(options.rows.split(",")) if options.rows else {row.name for row in found}
    chosen |= {row.plan for row in found if row.name in chosen and row.plan is not None}
    return [row for row in found if row.name in chosen]


def main() -> None:
    options = arguments().parse_args()
    if options.smoke:
        vars(options).update(SMOKE, row_steps=options.row_steps if options.row else SMOKE["row_steps"])
    if options.row:
        run_row(next(row for row in rows(options) if row.name == options.row), options)
        return
    if not options.render:
        options.work.mkdir(parents=True, exist_ok=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        drive(options)
    if not options.json.exists():
        raise SystemExit(f"{options.json}: no such file; nothing has been measured, and the documents stay as they are")
    table = render(json.loads(options.json.read_text(encoding="utf-8")))
    for document in options.markdown:
        quality.rewrite(document, options.name, table)
    print(table)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="demo", help="pipeline folder of a class-conditional model")
    add("--yardstick", type=Path, help="folder with cifar_fd.py; without one no distance is measured")
    add("--json", type=Path, required=True)
    add("--markdown", type=Path, action="append", default=[])
    add("--render", action="store_true", help="measure nothing; write the documents from the JSON")
    add("--name", default="pruning", help="name of the marked region")
    add("--work", type=Path, default=Path("pruning-work"), help="folder for models, data and the rows' logs")
    add("--devices", default="0", help="CUDA devices, comma-separated; cpu for none")
    add("--slots", type=int, default=8, help="rows at a time on each device but the headline's")
    add("--limit", type=float, default=560.0, help="seconds after which unfinished rows are ended")
    add("--keep", default="6")
    add("--keep-more", default="9")
    add("--search", default="1000", help="budget of the learned criterion")
    add("--recover", default="330s", help="budget of the headline")
    add("--recover-more", default="240s", help="budget of the deeper headline, which shares its device")
    add("--row-steps", type=int, default=6000, help="most recovery steps of every other row; less if time is short")
    add("--row-batch", type=int, default=512)
    add("--latents", type=int, default=50_000, help="training samples of the teacher")
    add("--latent-steps", type=int, default=25)
    add("--samples", type=int, default=5000, help="samples of a Frechet distance")
    add("--steps", type=int, default=50)
    add("--guidance", type=float, default=1.5)
    add("--seed", type=int, default=1, help="seed of the samples")
    add("--rows", default="", help="names of the rows to run, comma-separated; others in the JSON stay. Default: all")
    add("--row", help=argparse.SUPPRESS)
    add("--paced", type=int, default=0, help=argparse.SUPPRESS)
    add("--smoke", action="store_true", help="every row for a few steps, to see that all of it works")
    return parser


def drive(options: argparse.Namespace) -> None:
    """Runs the rows, each in a process of its own; what they found is written whenever one ends."""
    waiting, running = rows(options), {}
    devices = options.devices.split(",")
    start = time.monotonic()
    while (waiting or running) and time.monotonic() - start < options.limit:
        for name in [name for name, (process, *_) in running.items() if process.poll() is not None]:
            process, index, _ = running.pop(name)
            told = summary(options, name, process.returncode)
            print(f"[{time.monotonic() - start:5.0f} s] {name} on {devices[index]}: {told}", flush=True)
            gather(options, time.monotonic() - start)
        index = None
        for row in list(waiting):
            index = place(row, waiting, running, options)
            if index is None or not all(ready(options, need, row) for need in row.after):
                continue
            if row.name not in (HEADLINE, PACE):
                options.row_steps = options.paced or pace(options)
                options.paced = options.row_steps
            waiting.remove(row)
            running[row.name] = (launch(row, devices[index], options), index, row.weight)
        time.sleep(0.2)
    for process, *_ in running.values():
        process.terminate()
    gather(options, time.monotonic() - start)


def gather(options: argparse.Namespace, seconds: float) -> None:
    files = [path for row in rows(options) if (path := result(options, row.name)).exists()]
    settings = {k: v for k, v in vars(options).items() if isinstance(v, int | float | str) and k not in ("row", "name")}
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    if options.rows and options.json.exists():  # the rows that were not run stay as they are
        before = json.loads(options.json.read_text(encoding="utf-8"))
        new = {row["name"]: row for row in found}
        found = [new.pop(row["name"], row) for row in before["rows"]] + list(new.values())
        settings = before["settings"]
    data = {"model": options.name, "settings": settings, "seconds": round(seconds), "rows": found}
    options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def place(row: Row, waiting: list[Row], running: dict[str, Any], options: argparse.Namespace) -> int | None:
    """The device with the most room for a row, None when there is none. The first is the headline's while it runs."""
    if row.name == HEADLINE:
        return 0
    alone = HEADLINE in running or HEADLINE in [r.name for r in waiting]
    room = [0 if number == 0 and alone else options.slots for number in range(len(options.devices.split(",")))]
    for _, index, weight in running.values():
        room[index] -= weight
    best = max(range(len(room)), key=room.__getitem__)
    return best if room[best] >= row.weight else None


def pace(options: argparse.Namespace) -> int:
    """Recovery steps that every row of the comparison can be given, from the measured time of one."""
    compared = [row for row in rows(options) if row.table in ("criteria", "ablation")]
    if not compared or not result(options, PACE).exists():
        return options.row_steps
    step = json.loads(result(options, PACE).read_text(encoding="utf-8")).get("step_seconds")
    if step is None:
        return options.row_steps
    devices = max(1, len(options.devices.split(",")) - 1)
    # a part of the time goes to searches, samples and sharing
    steps = int(0.55 * devices * max(60.0, options.limit - 150) / (step * len(compared)))
    print(
        f"a step of {options.row_batch} takes {1000 * step:.1f} ms: {min(options.row_steps, steps)} a row", flush=True
    )
    return min(options.row_steps, max(1, steps))


def ready(options: argparse.Namespace, need: str, row: Row) -> bool:
    """Whether `row` finds what it takes from the row `need`: its plan, or only the data. A row that failed holds up
    nobody for ever: those behind it start, and fail by themselves."""
    over = result(options, need).exists() or need not in {r.name for r in rows(options)}
    if need == PACE:
        return over
    if row.plan == need:
        plan = saved_plan(options, need)
        if plan is not None:
            plan_file(options, row).write_text(json.dumps(plan), encoding="utf-8")
        return over or plan is not None
    from vdit_quant.prune.generate import is_complete

    try:
        return over or is_complete(options.work / "latents")
    except vdit_quant.InputError:  # its note is being written
        return False


def saved_plan(options: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """The plan of a row, finished or still in recovery."""
    from vdit_quant.calibrate.workspace import Workspace
    from vdit_quant.prune.writer import read_record

    target, workspace = options.work / name, Workspace(options.work / name)
    try:
        if target.exists():
            return read_record(target)["plan"]
        return json.loads(workspace.notes("plan")["plan"]) if workspace.has("plan") else None
    except (OSError, vdit_quant.InputError, SafetensorError):  # it is just being moved
        return None


def plan_file(options: argparse.Namespace, row: Row) -> Path:
    return options.work / f"{row.name}-plan.json"


def launch(row: Row, device: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    given = [*sys.argv[1:], "--row-steps", str(options.row_steps)]
    environment = {
        "OMP_NUM_THREADS": "1" if device == "cpu" else "4",
        "TORCHINDUCTOR_COMPILE_THREADS": "8",
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device,
    }
    with (options.work / f"{row.name}.log").open("wb") as log:
        command = [sys.executable, __file__, *given, "--row", row.name]
        return subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT)


def result(options: argparse.Namespace, name: str) -> Path:
    return options.work / f"{name}.json"


def summary(options: argparse.Namespace, name: str, code: int) -> str:
    if not result(options, name).exists():
        return f"exit code {code}, nothing found; see {options.work / name}.log"
    row = json.loads(result(options, name).read_text(encoding="utf-8"))
    shown = {k: row[k] for k in ("error", "distance", "kept", "seconds") if k in row}
    return json.dumps(shown)


def run_row(row: Row, options: argparse.Namespace) -> None:
    """Everything about one row; what is known is written after every part."""
    found: dict[str, Any] = {**asdict(row)}

    def note(**values: Any) -> None:
        found.update(values)
        temporary = result(options, row.name).with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
        temporary.replace(result(options, row.name))

    try:
        measure_row(row, options, note)
    except Exception as error:
        note(error=f"{type(error).__name__}: {error}")
        traceback.print_exc()


def measure_row(row: Row, options: argparse.Namespace, note: Any) -> None:
    from vdit_quant.prune.writer import read_record

    model: Any = options.model
    if row.name == PACE:
        tried = vdit_quant.prune_model(options.model, options.work / row.name, **row_settings(row, options))
        log = read_record(tried)["log"]["recovery"]
        half = log[len(log) // 2]
        note(step_seconds=(log[-1]["seconds"] - half["seconds"]) / max(1, log[-1]["step"] - half["step"]))
    else:
        start = time.perf_counter()
        model = vdit_quant.prune_model(options.model, options.work / row.name, **row_settings(row, options))
        seconds = {"wall": round(time.perf_counter() - start, 1)}
        record = read_record(model)
        steps = [stage[-1]["step"] if stage else 0 for stage in record["log"].values()]
        note(
            kept=record["plan"]["stacks"][0]["kept"],
            scores=record["plan"]["stacks"][0].get("scores", []),
            losses=record["losses"],
            seconds={**record["seconds"], **seconds},
            steps=dict(zip(record["log"], steps, strict=True)),
            batch_size=record["batch_size"],
            **({"plan_found": record["plan"], "log": record["log"]} if row.table == "headline" else {}),
        )
    if row.table != "search":
        note(distance=distance(model, row.label, options))
    if row.full:
        compressed = vdit_quant.compress(model, options.work / f"{row.name}-w4a8", bits="w4a8", **quick(options))
        sides = {"teacher": options.model, "pruned": model, "compound": compressed}
        note(speed={side: speed(path, options) for side, path in sides.items()})
        note(compound=distance(compressed, f"{row.label}, w4a8", options))
        draw(sides, options)


def row_settings(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    from vdit_quant.cli.console import Reporter

    latents, own = options.work / "latents", {"samples": options.latents, "steps": options.latent_steps}
    settings: dict[str, Any] = {
        "progress": Reporter(None),
        "grids": 0,
        "overwrite": True,
        "device": "cpu" if "cpu" in options.devices else None,
    }
    if row.name == HEADLINE or (row.table == "headline" and HEADLINE not in {r.name for r in rows(options)}):
        settings.update(own, cache=str(latents))
    elif "cache" in row.options:
        settings.update(own)
    else:  # what the headline's teacher sampled, for every seed: rows differ in training alone
        settings["data"] = latents
        if row.options.get("distill") != "none":
            settings["output_weight"] = 1.0
    settings.update(row.options)
    if row.plan is not None:
        settings["plan"] = str(plan_file(options, row))
    return settings


def quick(options: argparse.Namespace) -> dict[str, Any]:
    return {"steps": 3, "samples": 2, "guidance": options.guidance} if options.smoke else {"guidance": options.guidance}


def distance(model: Any, label: str, options: argparse.Namespace) -> float | None:
    from vdit_quant.evaluate.sampling import Workload

    if options.yardstick is None:
        return None
    size = min(1000, options.samples)
    workload = Workload(options.samples, options.steps, options.seed, options.guidance, size, dtype="float32")
    found = frechet.measure(label, model, workload, frechet.load_yardstick(options.yardstick), None)
    return round(found["distance"], 4)


def draw(sides: dict[str, Any], options: argparse.Namespace) -> None:
    """What the same labels and noise give, full depth above pruned and pruned above compressed, beside the JSON."""
    from vdit_quant.evaluate.picture import save_pairs
    from vdit_quant.evaluate.sampling import Workload, make_sampler
    from vdit_quant.runtime.load import default_device, default_dtype
    from vdit_quant.runtime.source import find_source

    device = default_device()
    workload = Workload(8, options.steps, options.seed, options.guidance)
    images = {
        side: make_sampler(find_source(path), default_dtype(device), device).run(workload).images
        for side, path in sides.items()
    }
    save_pairs(options.json.with_name(f"{options.json.stem}-pruned.png"), images["teacher"], images["pruned"])
    save_pairs(options.json.with_name(f"{options.json.stem}-compound.png"), images["pruned"], images["compound"])


def speed(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one call of the denoiser by batch size (median of 5 times 10 calls), and its bytes. On a GPU
    every side replays CUDA graphs, the default of `vdit_quant.load`."""
    import torch

    from vdit_quant.evaluate.compare import stored_bytes
    from vdit_quant.runtime.graphs import replay_graphs
    from vdit_quant.runtime.load import default_device, default_dtype
    from vdit_quant.runtime.source import find_source, load_transformer

    device = default_device()
    source = find_source(model)
    denoiser: Any = load_transformer(source, default_dtype(device), device)
    replay_graphs(denoiser, enabled=device.type == "cuda")
    config, times = denoiser.config, {}
    for batch in (2,) if options.smoke else (2, 32, 256, 1024):
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        call = {
            "timestep": torch.full((batch,), 500, device=device),
            "class_labels": torch.zeros(batch, device=device).long(),
        }
        latents = torch.randn(shape, device=device, dtype=denoiser.dtype)
        rounds = []
        with torch.no_grad():
            for number in range(6):
                wait(device)
                start = time.perf_counter()
                for _ in range(10):
                    denoiser(latents, **call)
                wait(device)
                rounds += [(time.perf_counter() - start) * 100] if number else []
        times[str(batch)] = round(statistics.median(rounds), 4)
    return {"ms": times, "bytes": stored_bytes(source, denoiser)}


def wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def render(found: dict[str, Any]) -> str:
    s, by_name = found["settings"], {row["name"]: row for row in found["rows"]}
    caption = (
        f"Model `{found['model']}`, {s['samples']:,} samples in float32, {s['steps']} steps, guidance {s['guidance']}; "
        "lower is better, not comparable with any published FID. Data: "
        f"{s['latents']:,} samples of the teacher, {s['latent_steps']} steps, no guidance."
    )
    parts = [caption, "", *headline(by_name), "", *comparison(by_name, s)]
    missing = [row["name"] for row in found["rows"] if "error" in row]
    return "\n".join([*parts, *(["", f"Failed: {', '.join(missing)}."] if missing else [])])


def headline(rows_by_name: dict[str, Any]) -> list[str]:
    """What full depth and the headline models gave, then the denoiser's times; rows without a figure are left out."""
    out = ["| | blocks kept | FD | data + search + recovery, s | steps |", "|---|---|---:|---:|---:|"]
    for name in ("teacher", "learned-9", HEADLINE):
        row = rows_by_name.get(name, {})
        if "distance" in row:
            spent = row.get("seconds", {})
            times = " + ".join(f"{spent[k]:.0f}" for k in ("data", "search", "recovery") if k in spent)
            steps = row.get("steps", {}).get("recovery", "")
            out.append(f"| {row['label']} | {blocks(row)} | {number(row['distance'])} | {times} | {steps} |")
    row = rows_by_name.get(HEADLINE, {})
    if "compound" in row:
        out.append(f"| {row['label']}, then w4a8 | {blocks(row)} | {number(row['compound'])} | | |")
    if "speed" in row:
        teacher = row["speed"]["teacher"]
        sizes = list(teacher["ms"])
        out += ["", f"| denoiser, ms a call, CUDA graphs | {' | '.join(f'batch {b}' for b in sizes)} | bytes |"]
        out.append("|---|" + "---:|" * (len(sizes) + 1))
        for side, values in row["speed"].items():
            cells = [f"{values['ms'][b]:.2f} ({teacher['ms'][b] / values['ms'][b]:.2f}x)" for b in sizes]
            share = f"{values['bytes'] / 1e6:.1f} MB ({values['bytes'] / teacher['bytes']:.2f}x)"
            out.append(f"| {side} | {' | '.join(cells)} | {share} |")
    return out


def comparison(rows_by_name: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    if not any(row["table"] in ("criteria", "ablation") and "distance" in row for row in rows_by_name.values()):
        return []
    out = [
        f"The same recovery for every row: {settings['row_steps']:,} steps of {settings['row_batch']} samples.",
        "",
        "| | seed | blocks kept | loss right after pruning | loss to teacher, recovered | FD |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for table in ("criteria", "ablation"):
        for row in sorted((r for r in rows_by_name.values() if r["table"] == table), key=lambda r: r["label"]):
            if "distance" in row:
                losses = row["losses"]
                seed = row["options"].get("seed", 0)
                out.append(
                    f"| {row['label']} | {seed} | {blocks(row)} | {losses['pruned']['diffusion']:.4f} "
                    f"| {losses['recovered']['output']:.5f} | {number(row['distance'])} |"
                )
    return out


def blocks(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row.get("kept", []))) or "all"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
