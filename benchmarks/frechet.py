"""Frechet distance of compressed models on a yardstick of your own, beside full precision.

    python benchmarks/frechet.py MODEL --yardstick FOLDER --variant w8a8 --variant w4a8 --json OUT --markdown DOC

FOLDER holds a Python file cifar_fd.py with `features(images) -> [N, D]`, `frechet(a, b)` and `reference()`; it is run,
so name only one you trust. Distances depend on the sample count and the sampler: both are printed, and they come
second to the paired error (a Frechet distance can rank a damaged model above the original).
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import quality
import torch

import vdit_quant
from vdit_quant.evaluate.sampling import Workload, make_sampler
from vdit_quant.runtime.load import default_device, pick_dtype
from vdit_quant.runtime.source import find_source


def main() -> None:
    parser = quality.arguments()
    parser.add_argument("--yardstick", type=Path, help="folder with cifar_fd.py")
    options = parser.parse_args()
    if not options.render:
        found = benchmark(options)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = render(json.loads(options.json.read_text(encoding="utf-8")))
    for document in options.markdown:
        quality.rewrite(document, options.name, table)
    print(table)


def benchmark(options: Any) -> dict[str, Any]:
    yardstick = load_yardstick(options.yardstick)
    seed = (options.seed or [1])[0]
    workload = Workload(options.samples, options.steps, seed, options.guidance, options.batch_size, dtype=options.dtype)
    rows = [measure("full precision", options.model, workload, yardstick, options.device)]
    for variant in options.variant or ["w8a8", "w4a8"]:
        with tempfile.TemporaryDirectory() as folder:
            settings = quality.settings_of(variant, options)
            artifact = vdit_quant.compress(options.model, Path(folder) / "artifact", **settings)
            rows.append(measure(variant, artifact, workload, yardstick, options.device))
    return {"model": options.name, "workload": vars(workload), "rows": rows}


def measure(
    label: str, model: str | Path, workload: Workload, yardstick: ModuleType, device: str | None
) -> dict[str, Any]:
    place = default_device() if device is None else torch.device(device)
    start = time.perf_counter()
    images = make_sampler(find_source(model), pick_dtype(workload.dtype, place), place).run(workload).images
    seconds = time.perf_counter() - start
    pixels = (images * 255).round().byte()
    distance = yardstick.frechet(yardstick.features(pixels, device=str(place)), yardstick.reference())
    print(f"{label}: FD {distance:.3f} ({len(images)} samples in {seconds:.0f} s)", flush=True)
    return {"variant": label, "distance": distance, "seconds": seconds}


def load_yardstick(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar_fd", folder / "cifar_fd.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def render(found: dict[str, Any]) -> str:
    w, full = found["workload"], found["rows"][0]["distance"]
    rows = [
        f"| {r['variant']} | {r['distance']:.3f} | {100 * (r['distance'] / full - 1):+.1f} % |" for r in found["rows"]
    ]
    caption = (
        f"Model `{found['model']}`, {w['samples']:,} samples, seed {w['seed']}, {w['steps']} steps, "
        f"guidance {w['guidance_scale']}. Lower is better; not comparable with any published FID."
    )
    return "\n".join([caption, "", "| | Frechet distance | against full precision |", "|---|---:|---:|", *rows])


if __name__ == "__main__":
    main()
