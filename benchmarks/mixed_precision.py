"""Mixed precision against single formats: quality at equal bytes, by MILP, greedy and uniform bit plans.

    python benchmarks/mixed_precision.py MODEL --json results/mixed.json

Every attention and feed-forward layer is compressed in every candidate, every modulation layer in every modulation
candidate; each (layer, candidate) is scored by the error it causes at the denoiser's output; plans are made for every
budget, and for the bytes of every single-candidate plan ("=..." rows: mixed against single at equal size); each plan
is sampled on the conditions and noise of the full-precision model. Writes the JSON, the table into the marked region of
the documents named, and, where matplotlib is installed, PNG plots beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import quality
import torch

import vdit_quant
from vdit_quant.calibrate.drift import Drift, drift_of
from vdit_quant.calibrate.plan import LayerPlan
from vdit_quant.calibrate.probe import Call, capture, probe_steps
from vdit_quant.calibrate.progress import Progress
from vdit_quant.calibrate.record import Recorder
from vdit_quant.calibrate.sensitivity import Scoring, measure, measure_samples, offers, relative_error, tie_qkv
from vdit_quant.evaluate.metrics import mean_psnr
from vdit_quant.evaluate.plan_plot import ALLOCATORS, plot_curves, plot_plan
from vdit_quant.evaluate.sampling import Sampler, Workload, make_sampler
from vdit_quant.quantize.allocate import LayerCandidates
from vdit_quant.quantize.bit_plan import BitPlan
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.format import Tensors
from vdit_quant.quantize.method import FloatLayer, resolve_method
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.quantize.stats import LayerStats
from vdit_quant.runtime.attach import attach, detach, linear_layers
from vdit_quant.runtime.demo import demo_path
from vdit_quant.runtime.family import block_of
from vdit_quant.runtime.load import linear_shapes, pick_device
from vdit_quant.runtime.source import find_source

CORE = ("attention", "feed_forward")
CANDIDATES = "w2g64-a8tok-h64,w3g64-a8tok-h64,w4g64-a8tok-h64,w6g64-a8tok-h64,w8-a8tok-h64"
CALIBRATION_SEED = 1_000_000  # no seed that is compared on
START = time.perf_counter()


def main() -> None:
    options = arguments().parse_args()
    if not options.render:
        try:
            measured = Benchmark(options).run()
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
    add("--candidates", default=CANDIDATES, help="specs of attention and feed-forward layers")
    add("--modulation", default="w4g64,w8", help="specs of modulation layers; one: fixed")
    add("--method", default="gptq", help="gptq, viditq, rtn, ...")
    add(
        "--sensitivity",
        choices=("drift", "output", "samples"),
        default="drift",
        help="denoiser output errors added up over the steps, plain, or errors of finished samples",
    )
    add("--tie-qkv", action="store_true", help="one spec for the query, key and value of an attention")
    add("--no-match", action="store_true", help="leave out the plans at the bytes of single-candidate plans")
    add("--samples", type=int, default=200, help="samples a seed")
    add("--seed", type=int, action="append", help="may be given again. Default: 1")
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=1.5)
    add("--batch-size", type=int, default=200)
    add("--calibration-samples", type=int, default=32)
    add("--probe-samples", type=int, default=8, help="samples whose calls the sensitivities are measured on")
    add("--probe-steps", type=int, default=5, help="timesteps of each of them")
    add("--device", help="cpu, cuda, ... Default: the GPU if there is one")
    add("--json", type=Path, required=True, help="where the figures are written; .md and .png go beside it")
    return parser


def note(message: str) -> None:
    print(f"[{time.perf_counter() - START:7.1f} s] {message}", flush=True)


class Notes(Progress):
    """Prints what happens, at most a line every few seconds."""

    name, total, last = "", 0, 0.0

    def stage(self, name: str, total: int) -> None:
        self.name, self.total = name, total

    def advance(self, done: int, detail: str = "") -> None:
        if time.perf_counter() - self.last > 5 or done == self.total:
            self.last = time.perf_counter()
            note(f"{self.name}: {done} of {self.total}, {detail}")

    def note(self, message: str) -> None:
        note(message)


@dataclass
class Measured:
    """What a plan gave: PSNR over the seeds, and the whole plan's error on the probe, which its sum predicts."""

    psnr: float
    probe_error: float
    by_seed: list[float] = field(default_factory=list)


class Benchmark:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = pick_device(options.device)
        source = find_source(demo_path() if options.model == "demo" else options.model)
        self.label = source.label.rstrip("/").rsplit("/", 1)[-1]
        self.sampler: Sampler = make_sampler(source, torch.float32, self.device)
        self.model, self.family = self.sampler.denoiser, self.sampler.family
        self.blocks, self.roles = self.family.block_names(self.model), self.family.linears(self.model)
        self.shapes = linear_shapes(self.model)
        self.stats: dict[str, LayerStats] = {}
        self.stored: dict[tuple[str, str], Tensors] = {}
        self.results: dict[tuple[tuple[str, str], ...], Measured] = {}
        self.seeds = tuple(options.seed or (1,))
        self.method, params = resolve_method(options.method, {})
        # a folded scale changes two layers at once; alone, a layer keeps its own
        self.params = {**params, **({"fold": False} if "fold" in params else {})}
        self.needs = self.method.needs(self.params)
        self.weights = {name: m.weight.detach().float() for name, m in linear_layers(self.model).items()}

    def run(self) -> dict[str, Any]:
        note(f"{self.label} on {self.device}, method {self.options.method}")
        offered = self.offered()
        self.stats, calls = self.calibrate([layer.name for layer, _ in offered])
        scoring = Scoring(tie=tie_qkv) if self.options.tie_qkv else Scoring()
        start = time.perf_counter()
        if self.options.sensitivity == "samples":
            probe = replace(self.workload(CALIBRATION_SEED + 1), samples=self.options.probe_samples)
            table = measure_samples(self.sampler, probe, offered, self.tensors_of, scoring, progress=Notes())
        else:
            if self.options.sensitivity == "drift":
                scoring = replace(scoring, drift=self.drift(calls))
            table = measure(self.model, self.family, calls, offered, self.tensors_of, scoring=scoring, progress=Notes())
        seconds = time.perf_counter() - start
        self.stats.clear()
        baseline = self.sample_seeds()
        note("full precision sampled")
        rows = [row for item in self.budgets(table) for row in self.rows_of(item, table, baseline, calls)]
        return {
            "model": self.label,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "versions": {"vdit-quant": vdit_quant.__version__, "torch": torch.__version__},
            "method": self.options.method,
            "sensitivity": self.options.sensitivity,
            "workload": asdict(self.workload(0)),
            "seeds": list(self.seeds),
            "sensitivity_seconds": seconds,
            "roles": {row.layer: self.roles[row.layer] for row in table},
            "shapes": {row.layer: list(self.shapes[row.layer]) for row in table},
            "blocks": self.blocks,
            "table": [asdict(row) for row in table],
            "rows": rows,
        }

    def drift(self, calls: list[Call]) -> Drift:
        steps = [float(t) for call in calls if call.timesteps is not None for t in call.timesteps]
        return drift_of(self.sampler.scheduler, steps, self.options.guidance)

    def workload(self, seed: int) -> Workload:
        o = self.options
        return Workload(o.samples, o.steps, seed, o.guidance, o.batch_size)

    def offered(self) -> list[tuple[LayerPlan, list[LayerSpec]]]:
        """Every core and modulation layer with its candidates, completed by the method, in the model's order."""
        out = []
        for name, role in self.roles.items():
            text = self.options.candidates if role in CORE else self.options.modulation if role == "modulation" else ""
            if not text:
                continue
            n, k = self.shapes[name]
            layer = LayerPlan(name, role, n, k, block_of(name, self.blocks), None, "", self.options.method)
            specs = [LayerSpec.parse(part) for part in text.split(",")]
            if role in CORE:
                specs = [self.method.complete(spec, n, k, self.params) for spec in specs]
            out += offers([layer], specs)
        return out

    def calibrate(self, names: list[str]) -> tuple[dict[str, LayerStats], list[Call]]:
        """Statistics of every layer and the probe's calls, each from a sampling run of its own."""
        o = self.options
        work = Workload(o.calibration_samples, o.steps, CALIBRATION_SEED, o.guidance, o.batch_size)
        stats: dict[str, LayerStats] = {}
        if self.needs:
            with Recorder(self.model, self.family, {name: self.needs for name in names}, o.steps) as recorder:
                self.sampler.run(work)
            stats = recorder.result()
            note(f"statistics recorded ({o.calibration_samples} samples)")
        probe = replace(work, samples=o.probe_samples, seed=CALIBRATION_SEED + 1)
        calls = capture(self.model, self.family, lambda: self.sampler.run(probe), probe_steps(o.steps, o.probe_steps))
        note(f"probe: {len(calls)} call(s) of {[len(c.run(self.model)) for c in calls]} rows")
        return stats, calls

    def tensors_of(self, layer: LayerPlan, spec: LayerSpec) -> Tensors:
        """Compressed once and kept: a layer in a plan is the very layer that was measured."""
        key = (layer.name, spec.name)
        if key not in self.stored:
            floats = FloatLayer(layer.name, self.weights[layer.name])
            tensors = self.method.compress(floats, self.stats.get(layer.name), spec, **self.params)
            self.stored[key] = {name: t.contiguous() for name, t in tensors.items()}
        return self.stored[key]

    def sample_seeds(self) -> list[torch.Tensor]:
        return [self.sampler.run(self.workload(seed)).images for seed in self.seeds]

    def budgets(self, table: list[LayerCandidates]) -> list[tuple[str, str]]:
        """(name, budget) of every row: those asked for, then the bytes of every single-candidate plan."""
        out = [(text, text) for text in self.options.budgets.split(",") if text]
        if self.options.no_match:
            return out
        for core, modulation in product(self.options.candidates.split(","), self.options.modulation.split(",")):
            size = 0
            for row in table:
                wanted = LayerSpec.parse(core if self.roles[row.layer] in CORE else modulation).weight
                same = [c for c in row.candidates if LayerSpec.parse(c.spec).weight == wanted]
                size += (same or row.candidates)[0].bytes
            out.append((f"= {core} + {modulation}", f"{size / 1e3}kB"))
        return out

    def rows_of(
        self, item: tuple[str, str], table: list[LayerCandidates], baseline: list[torch.Tensor], calls: list[Call]
    ) -> list[dict[str, Any]]:
        """The measured plans of all allocators at one (name, budget); none where it cannot be met."""
        (name, budget), rows = item, []
        for allocator, solve in ALLOCATORS.items():
            try:
                plan = solve(table, budget)
            except InputError as error:
                note(f"{name}: {error}")
                break
            key = tuple(sorted(plan.layers.items()))
            if key not in self.results:
                self.results[key] = self.measure_plan(plan, baseline, calls)
            got = self.results[key]
            note(f"{name} {allocator}: {plan.bits:.3f} bits, {got.psnr:.2f} dB, error {got.probe_error:.3g}")
            rows.append({"budget": name, "allocator": allocator, "plan": plan.to_dict(), **asdict(got)})
        return rows

    def measure_plan(self, plan: BitPlan, baseline: list[torch.Tensor], calls: list[Call]) -> Measured:
        with torch.no_grad():
            references = [call.run(self.model) for call in calls]
            tensors = {layer: self.stored[layer, spec] for layer, spec in plan.layers.items()}
            originals = attach(self.model, {layer: plan.spec_of(layer) for layer in plan.layers}, tensors)
            try:
                pairs = zip(calls, references, strict=True)
                error = sum(relative_error(c.run(self.model), r) * len(r) for c, r in pairs)
                images = self.sample_seeds()
            finally:
                detach(self.model, originals)
        scores = [mean_psnr(got, want) for got, want in zip(images, baseline, strict=True)]
        rows = sum(map(len, references))
        return Measured(sum(scores) / len(scores), error / rows, scores)


def render(found: dict[str, Any]) -> str:
    """One line for each budget and allocator, with the settings that the figures depend on."""
    w = found["workload"]
    lines = [
        f"Model `{found['model']}`, {found['method']}, {w['samples']} samples a seed (seeds "
        f"{', '.join(map(str, found['seeds']))}), {w['steps']} steps, guidance {w['guidance_scale']}, fp32 against the "
        f"full-precision model. {found['device']}, torch {found['versions']['torch']}. Sensitivities of "
        f"{sum(len(row['candidates']) for row in found['table'])} (layer, candidate) pairs in "
        f"{found['sensitivity_seconds']:.0f} s ({found['sensitivity']}; compression included).",
        "",
        "| budget | plan | bits | ratio | PSNR, dB | predicted error | whole plan's error | specs |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in found["rows"]:
        plan = row["plan"]
        counts: dict[str, int] = {}
        for spec in plan["layers"].values():
            counts[spec.split("-")[0]] = counts.get(spec.split("-")[0], 0) + 1
        specs = ", ".join(f"{count} {spec}" for spec, count in sorted(counts.items()))
        lines.append(
            f"| {row['budget']} | {row['allocator']} | {plan['bits']:.3f} | {16 / plan['bits']:.2f}x "
            f"| {row['psnr']:.2f} | {sum(plan['errors'].values()):.2e} | {row['probe_error']:.2e} | {specs} |"
        )
    return "\n".join(lines)


def plot(found: dict[str, Any], target: Path) -> None:
    """PSNR and error curves, and the MILP plan nearest to 4.5 bits. Raises InputError without matplotlib."""
    for label, key, name in (
        ("PSNR, dB", "psnr", "psnr"),
        ("relative squared error on the probe", "probe_error", "error"),
    ):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in found["rows"]:
            curves.setdefault(row["allocator"], []).append((row["plan"]["bits"], row[key]))
        curves = {allocator: sorted(set(points)) for allocator, points in curves.items()}
        plot_curves(curves, target.with_name(f"{target.stem}-{name}.png"), label, log=key != "psnr")
    plans = [BitPlan.from_dict(row["plan"]) for row in found["rows"] if row["allocator"] == "milp"]
    if plans:
        shapes = {name: (n, k) for name, (n, k) in found["shapes"].items()}
        chosen = min(plans, key=lambda plan: abs(plan.bits - 4.5))
        plot_plan(chosen, found["roles"], shapes, found["blocks"], target.with_name(f"{target.stem}-plan.png"))


if __name__ == "__main__":
    main()
