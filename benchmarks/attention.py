"""Attention of DiT shapes: this project's kernel and SDPA's back-ends, as JSON and as a table in a document.

    python benchmarks/attention.py --json benchmarks/results/attention.json --markdown docs/benchmarks.md

Every implementation is checked against float32 before it is timed, on q, k and v that are slices of one merged
projection; the time includes the layout that the output projection reads. The table replaces what stands between
`<!-- attention:begin -->` and `<!-- attention:end -->`; `--render` writes it again from the JSON without measuring.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdit_quant.kernels import dispatch
from vdit_quant.kernels.attention import attention

SHAPES = {
    "DiT-XL/2, 256 px, batch 32": (32, 16, 256, 72),
    "PixArt, 512 px, batch 2": (2, 16, 1024, 72),
    "PixArt, 1024 px, batch 2": (2, 16, 4096, 72),
    "SD3-like, batch 32": (32, 24, 256, 64),
    "CogVideoX, 49 frames, batch 2": (2, 24, 17776, 64),
    "FLUX, 1024 px": (1, 24, 4608, 128),
}
"""Batch, heads, tokens, head dimension."""

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Call = Callable[[], Tensor]


def main() -> None:
    options = arguments().parse_args()
    if not options.render:
        found = benchmark(options.repeats)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = render(json.loads(options.json.read_text(encoding="utf-8")))
    for document in options.markdown:
        rewrite(document, table)
    print(table)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--repeats", type=int, default=50, help="timed calls of each; the median counts")
    add("--json", type=Path, required=True, help="where the figures are written")
    add("--markdown", type=Path, action="append", default=[], help="document with the marked region; may be repeated")
    add("--render", action="store_true", help="measure nothing; write the documents from the JSON")
    return parser


def benchmark(repeats: int) -> dict[str, Any]:
    """Measures every shape; the result is plain JSON."""
    rows = []
    for name, (batch, heads, tokens, head_dim) in SHAPES.items():
        torch.manual_seed(0)
        merged = torch.randn(batch, tokens, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        calls, refused = usable(*merged.unbind(2))
        errors = {each: error(call, *merged.unbind(2)) for each, call in calls.items()}
        times = measure(calls, repeats)
        row = {"name": name, "shape": [batch, heads, tokens, head_dim], "refused": refused}
        row |= {"errors": errors, "microseconds": times}
        rows.append(row)
        print(name, {each: f"{time:.0f} us" for each, time in times.items()}, refused, flush=True)
        torch.cuda.empty_cache()
    versions = {"torch": torch.__version__, "triton": dispatch.triton_version()}
    return {"machine": torch.cuda.get_device_name(), "versions": versions, "repeats": repeats, "rows": rows}


def usable(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """The implementations that take this input, and why the others do not."""
    scale, refused, calls = q.shape[3] ** -0.5, {}, {}
    candidates = {name: lambda name=name: sdpa(q, k, v, scale, BACKENDS[name]) for name in BACKENDS}
    for name, call in {"triton": lambda: triton(q, k, v, scale), **candidates}.items():
        try:
            call()
            calls[name] = call
        except RuntimeError as reason:
            refused[name] = str(reason).splitlines()[-1]
    return calls, refused


def triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with dispatch.use(mode="triton"):
        return attention(q, k, v, scale)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: SDPBackend) -> Tensor:
    with sdpa_kernel([backend]):
        y = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
        )
    return y.transpose(1, 2).flatten(2).contiguous()


def error(call: Call, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative RMS error over the first and last head, against float64."""
    heads, worst = q.shape[2], []
    y = call().unflatten(2, (heads, -1))
    for head in (0, heads - 1):
        wide = [x[-1, :, head].double() for x in (q, k, v)]
        scores = (rows @ wide[1].T * q.shape[3] ** -0.5 for rows in wide[0].split(2048))
        want = torch.cat([part.softmax(1) @ wide[2] for part in scores])
        worst.append(float((y[-1, :, head] - want).norm() / want.norm()))
    return max(worst)


def measure(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median microseconds of each on the GPU, by CUDA graphs of one call, in random order."""
    graphs = {name: capture(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name in random.sample(list(graphs), len(graphs)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def capture(call: Call) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def render(found: dict[str, Any]) -> str:
    """The table, with the settings that its figures depend on."""
    names = ["triton", *BACKENDS]
    rows = ["| shape | head | " + " | ".join(names) + " | error, best SDPA / triton |", "|---|---:|" + "---:|" * 5]
    for row in found["rows"]:
        cells = [cell(row, name) for name in names]
        errors = row["errors"]
        others = [value for name, value in errors.items() if name != "triton"]
        pair = f"{min(others):.1e} / {errors['triton']:.1e}" if "triton" in errors and others else "-"
        rows.append(f"| {row['name']} | {row['shape'][3]} | {' | '.join(cells)} | {pair} |")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    caption = (
        f"Microseconds (TFLOP/s without padding), bfloat16, median of {found['repeats']}. "
        f"{found['machine']}; {versions}. `triton` is this project's kernel; the others are back-ends of SDPA."
    )
    return "\n".join([caption, "", *rows])


def cell(row: dict[str, Any], name: str) -> str:
    """Time and rate, bold where it is the fastest."""
    times = row["microseconds"]
    if name not in times:
        return "-"
    batch, heads, tokens, head_dim = row["shape"]
    shown = f"{times[name]:.0f} ({4 * batch * heads * tokens**2 * head_dim / times[name] / 1e6:.0f})"
    return f"**{shown}**" if times[name] == min(times.values()) else shown


def rewrite(document: Path, table: str) -> None:
    """Replaces the marked region of `document`. Raises SystemExit when the marks are not there."""
    begin, end = "<!-- attention:begin -->", "<!-- attention:end -->"
    text = document.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{document}: expected one {begin} ... {end}")
    before, rest = text.split(begin)
    document.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
