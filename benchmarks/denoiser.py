"""Speed and memory of whole denoisers, compressed against bf16, in one process with the order shuffled.

    python benchmarks/denoiser.py                                   measure every model; add them to the JSON
    python benchmarks/denoiser.py --model dit-xl-b32                one model; the others in the JSON stay
    python benchmarks/denoiser.py --render --markdown docs/benchmarks.md --plot docs/images/denoiser.png
    python benchmarks/denoiser.py --model dit-xl-b2 --way w8a8 --way w8a8-graph --rounds 2 --json try.json

Weights are random: speed does not depend on them. Every timed path is checked in the same run: its error against the
model in fp32, and that of a fused path against the same compressed weights unfused, which must stay within twice
bf16's own error (of the model; for `COARSE` recipes, of the compressed weights). The script ends with status 1 when one
does not. Other libraries' models are compiled block by block and replayed as one CUDA graph, where they can be: as a
whole some compile for minutes. Caches of compiled kernels start empty.

The tables replace what stands between `<!-- denoiser:begin -->` and `<!-- denoiser:end -->`; `--render` writes them
from the JSON without measuring. A document with `<!-- speed:begin -->` gets one line a model there instead.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import random_models
import torch
from _render import rewrite, versions
from denoiser_tables import disagreeing, plot, render, summary
from denoiser_ways import PEERS, WAYS, Bench, Path_, bytes_of, is_compiled, release, time_paths
from random_models import Shape
from torch._functorch import config as functorch_config

MODELS: dict[str, tuple[Shape, int, str]] = {
    "dit-xl-b32": (random_models.dit_xl(), 32, "DiT-XL/2, batch 32, 256 tokens"),
    "dit-xl-b2": (random_models.dit_xl(), 2, "DiT-XL/2, batch 2, 256 tokens"),
    "pixart-b2": (random_models.pixart_sigma(), 2, "PixArt-Sigma, batch 2, 4096 tokens"),
    "flux-b1": (random_models.flux(), 1, "FLUX-shaped, 4 + 8 blocks, batch 1, 4096 + 512 tokens"),
    "cogvideox-b1": (random_models.cogvideox(), 1, "CogVideoX-5B-shaped, 6 blocks, batch 1, 17550 + 226 tokens"),
}


def main() -> None:
    options = arguments().parse_args()
    # a graph that another back-end's attention was traced into must never be taken from a cache on disk
    functorch_config.enable_autograd_cache = False
    found = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {"models": {}}
    deadline = time.perf_counter() + options.limit
    with empty_caches():
        for name in [] if options.render else options.model or MODELS:
            for result in measure_model(name, options, deadline):
                found["models"][name] = result
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = render(found)
    if options.plot is not None:
        plot(found, options.plot)
    for document in options.markdown:
        if "<!-- speed:begin -->" in document.read_text(encoding="utf-8"):
            rewrite(document, "speed", summary(found))
            continue
        label = "Bars: how many times as fast as the fastest compiled bf16 each way is"
        picture = options.plot and (label, options.plot)
        rewrite(document, "denoiser", text, picture)
    print(text)
    if wrong := [f"{model} {way}" for model in found["models"] for way in disagreeing(found["models"][model])]:
        raise SystemExit(f"farther from its unfused reference than twice bf16's own error: {', '.join(wrong)}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", choices=sorted(MODELS), help="may be given again. Default: all")
    add("--way", action="append", choices=WAYS, help="may be given again. Default: all")
    add("--rounds", type=int, default=5, help="rounds of ten forwards, each in a new order")
    add("--limit", type=float, default=math.inf, help="seconds; a way that would end after them is left out")
    add("--json", type=Path, default=Path("benchmarks/results/denoiser.json"))
    add("--markdown", type=Path, action="append", default=[], help="document with the marked region; may be repeated")
    add("--plot", type=Path, help="PNG to draw; needs matplotlib")
    add("--render", action="store_true", help="measure nothing; tables and plot from the JSON")
    return parser


@contextmanager
def empty_caches() -> Iterator[None]:
    """In the block compiled kernels are cached in folders that start empty: whatever ran before on this machine, a
    first call compiles what it needs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            os.environ[variable] = str(Path(folder, variable))
        yield


def measure_model(name: str, options: argparse.Namespace, deadline: float = math.inf) -> Iterator[dict[str, Any]]:
    """Every way of one model: errors, first call, latency, memory; a way that fails is listed with its reason, and so
    is one that there was no time for. Once without other libraries, then once more with each of them added: compiling
    one can take longer than everything else, or never end."""
    shape, batch, label = MODELS[name]
    bench = Bench.of(shape, batch)
    ways = options.way or WAYS
    paths: list[Path_] = []
    failed: dict[str, str] = {}
    longest = {False: 0.0, True: 0.0}  # that any way has taken until it could be timed, compiled or not
    for part in filter(None, ([way for way in ways if way not in PEERS], *([way] for way in ways if way in PEERS))):
        for way in part:
            begin, kind = time.perf_counter(), is_compiled(way)
            timing = sum(11 * options.rounds * path.seconds for path in paths)
            if begin + longest[kind] + timing > deadline:
                failed[way] = "no time was left"
                continue
            try:
                paths.append(bench.prepare(way))
                took = time.perf_counter() - begin
                print(f"{name} {way}: {paths[-1].found}, {took:.0f} s until it could be timed", flush=True)
            except Exception as error:  # one way that fails must not lose the others
                failed[way] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                print(f"{name} {way}: {failed[way]}", flush=True)
            longest[kind] = max(longest[kind], time.perf_counter() - begin)
        rows = time_paths(paths, options.rounds)
        yield {
            "label": label, "batch": batch, "machine": torch.cuda.get_device_name(), "versions": versions(),
            "forwards": 10 * options.rounds, "bf16_bytes": bytes_of(bench.base), "bf16_error": bench.bf16_error,
            "rows": rows, "failed": dict(failed),
        }  # fmt: skip
    del paths, bench
    release()


if __name__ == "__main__":
    main()
