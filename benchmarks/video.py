"""What compression costs a video model: pixels, motion, and whether the video still shows what was asked for.

    python benchmarks/make_video_conditions.py TOKENS.safetensors conditions.safetensors
    python benchmarks/video.py MODEL/transformer conditions.safetensors --variant w8a8 --variant w4a8:gptq \\
        --samples 200 --seeds 1 --json benchmarks/results/video.json --markdown docs/video.md

For a flow-matching model of moving digits with values in -1..1, whose condition 4 * digit + direction asks for one
digit that starts in one direction. Every variant runs on the conditions and noise of the full-precision model, and each
BITS:METHOD next to BITS:rtn. The table replaces what stands between `<!-- quality:NAME:begin -->` and
`<!-- quality:NAME:end -->`; `--render` writes it again from the JSON.

"Right" is judged by the full-precision model itself, a classifier with nothing to train (Li et al. 2023, "Your
Diffusion Model is Secretly a Zero-Shot Classifier", arXiv 2303.16203): of all conditions c that differ in the digit, or
in the direction, a video x shows the one that explains it best,

    argmin_c sum_s || v(x_s, 1000 s, c) - (n - x) ||^2,   x_s = (1 - s) x + s n,

over a few noise levels s, with one noise n a video and level for all candidates. "Right" is what was asked for; "kept"
is what the judge sees in the full-precision video of the same noise, so that an exact model keeps everything. The first
row of the table is the judge's own accuracy, on the full-precision videos: nothing smaller than its error can be read
from the "right" columns. (A digit that starts at the edge turns round at once, and some digits are drawn badly.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quality
import torch
from safetensors.torch import load_file
from torch import Tensor

import vdit_quant
from vdit_quant.evaluate.conditions import condition_order
from vdit_quant.evaluate.metrics import mean_psnr, relative_error
from vdit_quant.evaluate.sampling import Sampler, Workload, make_sampler
from vdit_quant.runtime.describe import describe_artifact
from vdit_quant.runtime.source import find_source

DIGITS, DIRECTIONS = 10, 4
LEVELS = (0.5, 0.6, 0.7, 0.8)  # where the candidates' errors differ most for their spread


def main() -> None:
    options = arguments().parse_args()
    if not options.render:
        found = benchmark(options)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = render(json.loads(options.json.read_text(encoding="utf-8")))
    for document in options.markdown:
        quality.rewrite(document, options.name, table)
    print(table)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="transformer folder with its scheduler next to it")
    add("conditions", type=Path, help="file of make_video_conditions.py")
    add("--variant", action="append", help="BITS or BITS:METHOD; may be given again. Default: w8a8, w4a8")
    add("--samples", type=int, default=200, help="samples a seed")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=3.0)
    add("--batch-size", type=int, default=32)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--name", default="video", help="name of the marked region")
    add("--json", type=Path, required=True, help="where the figures are written")
    add("--markdown", type=Path, action="append", default=[], help="document with the marked region; may be repeated")
    add("--render", action="store_true", help="measure nothing; write the documents from the JSON")
    return parser


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every variant; the result is plain JSON."""
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    workload = Workload(
        options.samples, options.steps, 0, options.guidance, options.batch_size, str(options.conditions)
    )
    sampler = load(options.model, options)
    want = sample(sampler, workload, options.seeds)
    table = load_file(options.conditions)["encoder_hidden_states"]
    asked = torch.cat([condition_order(len(table), options.samples, seed) for seed in options.seeds])
    judge = Judge(sampler.denoiser, table, asked, options.batch_size)
    seen = judge.labels(torch.cat(want))
    rows: list[dict[str, Any]] = []
    for variant in with_baselines(options.variant or ["w8a8", "w4a8"]):
        rows.append(measure_variant(variant, options, workload, want, (judge, seen)))
        compare_to_rtn(rows)
        print({key: value for key, value in rows[-1].items() if key != "by_seed"}, flush=True)
    return {
        "model": Path(options.model).resolve().parent.name,
        "machine": quality.machine(options.device),
        "versions": {"vdit-quant": vdit_quant.__version__, "torch": torch.__version__},
        "workload": {key: value for key, value in workload.to_dict().items() if key != "seed"},
        "seeds": options.seeds,
        "dtype": options.dtype,
        "full_precision": judge.shares(seen, judge.asked, "right"),
        "rows": rows,
    }


def load(model: str | Path, options: argparse.Namespace) -> Sampler:
    return make_sampler(find_source(model), getattr(torch, options.dtype), options.device)


def sample(sampler: Sampler, workload: Workload, seeds: Sequence[int]) -> list[Tensor]:
    """Videos in -1..1 for each seed: float32 [samples, C, T, H, W]."""
    settings = {
        key: getattr(workload, key) for key in ("samples", "steps", "guidance_scale", "batch_size", "conditions")
    }
    return [sampler.run(Workload(seed=seed, **settings)).images.clamp(-1, 1) for seed in seeds]


def with_baselines(variants: Sequence[str]) -> list[str]:
    """The variants, each after round-to-nearest at the same bits."""
    out: list[str] = []
    for variant in variants:
        bits, _, method = variant.partition(":")
        out += [f"{bits}:rtn", f"{bits}:{method or 'rtn'}"]
    return list(dict.fromkeys(out))


def measure_variant(
    variant: str, options: argparse.Namespace, workload: Workload, want: list[Tensor], verdict: tuple[Judge, Tensor]
) -> dict[str, Any]:
    bits, method = variant.split(":")
    with tempfile.TemporaryDirectory() as folder:
        artifact = vdit_quant.compress(
            options.model,
            Path(folder) / "artifact",
            bits=bits,
            method=method,
            guidance=options.guidance,
            conditions=str(options.conditions),
            device=options.device,
        )
        inside = describe_artifact(artifact, options.device)
        got = sample(load(artifact, options), workload, options.seeds)
    by_seed = [measure(seed, ours, theirs) for seed, ours, theirs in zip(options.seeds, got, want, strict=True)]
    means = {key: statistics.fmean(row[key] for row in by_seed) for key in ("psnr", "temporal_error", "path_error")}
    judge, seen = verdict
    shown = judge.labels(torch.cat(got))
    return {
        "bits": bits,
        "method": method,
        "methods": quality.methods(inside["provenance"]["recipe"]),
        **means,
        **judge.shares(shown, judge.asked, "right"),
        **judge.shares(shown, seen, "kept"),
        "ratio": inside["ratio"],
        "by_seed": by_seed,
    }


def measure(seed: int, got: Tensor, want: Tensor) -> dict[str, float]:
    """Paired figures of one seed, [n, C, T, H, W] each. temporal_error: relative RMS error of the differences between
    consecutive frames; path_error: mean distance in pixels between the two centres of mass, frame by frame."""
    steps = [video.diff(dim=2) for video in (got, want)]
    return {
        "seed": seed,
        "psnr": mean_psnr(got, want, 2.0),
        "temporal_error": relative_error(*steps),
        "path_error": float((centres(got) - centres(want)).norm(dim=-1).mean()),
    }


def centres(video: Tensor) -> Tensor:
    """Centre of mass of every frame's brightness: [n, C, T, H, W] -> [n, T, 2]."""
    mass = ((video.mean(1) + 1) / 2 - 0.1).clamp_min(0) + 1e-6  # the faint background does not count
    total = mass.sum((-2, -1))
    y, x = (torch.arange(size, dtype=mass.dtype) for size in mass.shape[-2:])
    return torch.stack([(mass.sum(-1) @ y) / total, (mass.sum(-2) @ x) / total], dim=-1)


def compare_to_rtn(rows: list[dict[str, Any]]) -> None:
    """Fills in the last row's PSNR above round-to-nearest at the same bits."""
    plain = next(row for row in rows if row["bits"] == rows[-1]["bits"] and row["method"] == "rtn")
    rows[-1]["psnr_over_rtn"] = rows[-1]["psnr"] - plain["psnr"]


@dataclass
class Judge:
    """Says which digit and direction a video shows.

    table  [DIGITS * DIRECTIONS, ...]: the condition of each pair
    asked  int64 [n]: the condition that each of the videos to judge was sampled with
    """

    denoiser: Any
    table: Tensor
    asked: Tensor
    batch_size: int

    def labels(self, videos: Tensor) -> Tensor:
        """Digit and direction of each of the videos float32 [n, C, T, H, W]: int64 [n, 2]. The digit is looked for
        among the conditions with the direction that was asked for, the direction among those with that digit."""
        digit, direction = self.asked // DIRECTIONS, self.asked % DIRECTIONS
        digits = torch.arange(DIGITS) * DIRECTIONS + direction[:, None]
        directions = digit[:, None] * DIRECTIONS + torch.arange(DIRECTIONS)
        errors = self.errors(videos, torch.cat([digits, directions], dim=1))
        return torch.stack([errors[:, :DIGITS].argmin(1), errors[:, DIGITS:].argmin(1)], dim=1)

    def shares(self, shown: Tensor, wanted: Tensor, name: str) -> dict[str, float]:
        """Shares of labels int64 [n, 2] that equal `wanted`, labels [n, 2] or conditions [n]."""
        if wanted.dim() == 1:
            wanted = torch.stack([wanted // DIRECTIONS, wanted % DIRECTIONS], dim=1)
        same = shown == wanted
        parts = {"digit": same[:, 0], "direction": same[:, 1], "both": same.all(1)}
        return {f"{part}_{name}": float(value.float().mean()) for part, value in parts.items()}

    @torch.no_grad()
    def errors(self, videos: Tensor, candidates: Tensor) -> Tensor:
        """How badly each candidate condition int64 [n, c] explains each video: float32 [n, c]."""
        device, dtype = self.denoiser.device, self.denoiser.dtype
        generator = torch.Generator().manual_seed(0)
        which = torch.arange(len(videos)).repeat_interleave(candidates.shape[1])
        total = torch.zeros(len(which))
        for level in LEVELS:
            noise = torch.randn(videos.shape, generator=generator)
            for part in torch.arange(len(which)).split(2 * self.batch_size):
                x, n = (t[which[part]].to(device) for t in (videos, noise))
                out = self.denoiser(
                    ((1 - level) * x + level * n).to(dtype),
                    timestep=torch.full((len(part),), 1000 * level, device=device),
                    encoder_hidden_states=self.table[candidates.flatten()[part]].to(device, dtype),
                    return_dict=False,
                )[0]
                total[part] += (out.float() - (n - x)).square().flatten(1).mean(1).cpu()
        return total.view(candidates.shape)


def render(found: dict[str, Any]) -> str:
    """The table, with the settings that its figures depend on."""
    w = found["workload"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = [
        "| `--bits` | methods | PSNR, dB | over rtn, dB | temporal error | path error, px | digit right "
        "| direction right | both right | both kept | compressed layers |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| full precision | | | | | | {percentages(found['full_precision'])} | | |",
    ]
    for row in found["rows"]:
        over = "" if row["method"] == "rtn" else f"{row['psnr_over_rtn']:+.2f}"
        rows.append(
            f"| {row['bits']} | {row['methods']} | {row['psnr']:.2f} | {over} | {row['temporal_error']:.3f} "
            f"| {row['path_error']:.2f} | {percentages(row)} | {100 * row['both_kept']:.1f} % | {row['ratio']:.3f}x |"
        )
    caption = (
        f"Model `{found['model']}`. {w['samples']} videos a seed, seeds {', '.join(map(str, found['seeds']))}, "
        f"{w['steps']} steps, guidance {w['guidance_scale']}, {found['dtype']}. {found['machine']}; {versions}."
    )
    return "\n".join([caption, "", *rows])


def percentages(row: dict[str, float]) -> str:
    return " | ".join(f"{100 * row[f'{part}_right']:.1f} %" for part in ("digit", "direction", "both"))


if __name__ == "__main__":
    main()
