"""What compression costs: paired PSNR and SSIM of several recipes on one model, as JSON and as a table in a document.

    python benchmarks/quality.py demo --variant w8a8 --variant w4a8:rtn --name demo \\
        --json benchmarks/results/demo.json --markdown README.md

Every variant is compressed into a temporary folder and sampled on the conditions and noise of the full-precision
model, which is sampled once. The table replaces what stands between `<!-- quality:NAME:begin -->` and
`<!-- quality:NAME:end -->` of the document, which is made where there is none. It is written from the JSON alone;
`--render` writes it again without measuring.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _render
import torch

import vdit_quant
from vdit_quant.evaluate.compare import Run, check_pair, compare_runs, sample_seeds
from vdit_quant.evaluate.sample_parts import part_folder
from vdit_quant.evaluate.sampling import Workload
from vdit_quant.runtime.describe import describe_artifact


def main() -> None:
    options = arguments().parse_args()
    for document in options.markdown:
        _render.check_document(document, f"quality:{options.name}")
    if not options.render:
        found = benchmark(options)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = render(json.loads(options.json.read_text(encoding="utf-8")))
    for document in options.markdown:
        rewrite(document, options.name, table)
    print(table)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="demo", help="pipeline folder, transformer folder, hub id, or demo")
    add("--variant", action="append", help="BITS[:METHOD[:KEY=VALUE,...]]; may be given again. Default: w8a8, w4a8")
    add("--samples", type=int, default=20, help="samples a seed")
    add("--seed", type=int, action="append", help="may be given again. Default: 1, 2, 3 (calibration draws others)")
    add("--steps", type=int, default=20)
    add("--guidance", type=float, help="default: the pipeline's own")
    add("--batch-size", type=int, default=16)
    add("--dtype", help="compute dtype of both. Default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", help="cpu, cuda, ... Default: the GPU if there is one")
    add("--name", default="demo", help="name of the marked region")
    add("--json", type=Path, required=True, help="where the figures are written")
    add("--markdown", type=Path, action="append", default=[], help="document with the marked region; may be repeated")
    add("--render", action="store_true", help="measure nothing; write the documents from the JSON")
    return parser


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every variant; the result is plain JSON."""
    seeds = tuple(options.seed or (1, 2, 3))
    workload = Workload(options.samples, options.steps, 0, options.guidance, options.batch_size, dtype=options.dtype)
    with part_folder(None) as folder:
        baseline = sample_seeds(options.model, workload, seeds, options.device, "baseline", folder=folder)
        rows = [measure_variant(variant, options, baseline) for variant in options.variant or ["w8a8", "w4a8"]]
    return {
        "model": options.name,
        "machine": machine(baseline.device),
        "versions": {"vdit-quant": vdit_quant.__version__, "torch": torch.__version__},
        "workload": {k: v for k, v in asdict(workload).items() if k != "seed"},
        "seeds": list(seeds),
        "sampler": baseline.sampler,
        "dtype": baseline.dtype,
        "baseline_bytes": baseline.bytes,
        "rows": rows,
    }


def measure_variant(variant: str, options: argparse.Namespace, baseline: Run) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, part_folder(None) as kept:
        settings = settings_of(variant, options)
        start = time.perf_counter()
        artifact = vdit_quant.compress(options.model, Path(folder) / "artifact", **settings)
        seconds = time.perf_counter() - start
        check_pair(artifact, options.model)
        inside = describe_artifact(artifact, options.device)
        run = sample_seeds(artifact, baseline.workload, baseline.seeds, options.device, variant, folder=kept)
        result = compare_runs(run, baseline)
    row = {
        "variant": variant,
        "bits": variant.partition(":")[0],
        "methods": methods(inside["provenance"]["recipe"]),
        "psnr": result.psnr,
        "psnr_spread": result.psnr_spread,
        "ssim": result.ssim,
        "ratio": inside["ratio"],
        "compressed_bytes": inside["compressed_bytes"],
        "bytes": result.bytes_artifact,
        "calibration_seconds": seconds,
        "by_seed": [asdict(seed) for seed in result.seeds],
    }
    print(f"{variant}: {row['psnr']:.2f} dB, {row['ratio']:.3f}x, calibrated in {seconds:.1f} s", flush=True)
    return row


def settings_of(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """The options of `vdit_quant.compress` for BITS[:METHOD[:KEY=VALUE,...]]."""
    bits, method, params = (*variant.split(":", 2), "", "")[:3]
    return {
        "bits": bits,
        "method": method or None,
        "params": tuple(params.split(",")) if params else (),
        "guidance": options.guidance,
        "dtype": options.dtype,
        "device": options.device,
    }


def methods(recipe: dict[str, Any]) -> str:
    """The recipe's methods in order, each once, such as "gptq, rtn"."""
    return ", ".join(dict.fromkeys(step["method"] for step in recipe["step"]))


def machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def render(found: dict[str, Any]) -> str:
    """The table, with the settings that its figures depend on."""
    rows = [
        "| `--bits` | method | PSNR, dB | SSIM | compressed layers | denoiser | calibrated in |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        rows.append(
            f"| {row['bits']} | {row['methods']} | {row['psnr']:.2f} ± {row['psnr_spread']:.2f} | {row['ssim']:.4f} "
            f"| {row['ratio']:.3f}x | {row['bytes'] / found['baseline_bytes']:.2f}x "
            f"| {row['calibration_seconds']:.1f} s |"
        )
    return "\n".join([caption(found), "", *rows])


def caption(found: dict[str, Any]) -> str:
    """One paragraph: what the figures were measured on and with."""
    w, shown = found["workload"], ", ".join(map(str, found["seeds"]))
    guidance = "the pipeline's default" if w["guidance_scale"] is None else w["guidance_scale"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"Model `{found['model']}`. {w['samples']} samples a seed, seeds {shown} (mean ± sample "
        f"standard deviation over the seeds), {w['steps']} steps, {found['sampler']}, guidance {guidance}, "
        f"{found['dtype']}. {found['machine']}; {versions}."
    )


def rewrite(document: Path, name: str, table: str) -> None:
    """Replaces the marked region of `document`. Raises SystemExit when the marks are not there."""
    _render.rewrite(document, f"quality:{name}", table)


if __name__ == "__main__":
    main()
