"""Linear layers on one GPU: torch's products against the kernels here, as JSON and as tables in a document.

    python benchmarks/gemm.py [--quick]            measure, write benchmarks/results/gemm.json and docs/benchmarks.md
    python benchmarks/gemm.py --render             write the document again from the JSON

Every path is checked against its reference before it is timed. Times are medians over rounds that run the paths of a
shape in turn, each round one CUDA graph with as many different weights as it takes to miss the cache, as in a model.
The tables replace what stands between `<!-- gemm:begin -->` and `<!-- gemm:end -->`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _render import rewrite

import vdit_quant
from vdit_quant.kernels import dispatch, launch_table
from vdit_quant.kernels.int4_linear import int4_linear, int4_to_int8, int4_weight_linear
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.quantize.spec import LayerSpec

SHAPES = [
    (512, 4608, 1152), (1024, 4608, 1152), (4096, 4608, 1152), (8192, 1152, 1152), (8192, 3456, 1152),
    (8192, 4608, 1152), (8192, 1152, 4608), (4608, 3072, 3072), (4608, 12288, 3072), (4608, 3072, 12288),
    (17776, 3072, 3072), (32768, 5120, 5120),
]  # fmt: skip
SMALL = [(m, n, k) for n, k in ((6912, 1152), (193536, 1152), (18432, 3072)) for m in (1, 2, 16, 64)]
GROUP = 64
CACHE_BYTES = 120e6
E4M3_MAX = 448.0

Path_ = tuple[Callable[[int], torch.Tensor], torch.Tensor, float]  # call with weight i, what call(0) must be, tolerance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes of each table, fewer rounds")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the document from the JSON")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gemm.json"))
    parser.add_argument(
        "--markdown", type=Path, default=Path("docs/benchmarks.md"), help="document with the marked region"
    )
    options = parser.parse_args()
    if not options.render:
        found = benchmark(options.quick)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables = render(json.loads(options.json.read_text(encoding="utf-8")))
    if options.markdown.is_file():
        rewrite(options.markdown, "gemm", tables)
    print(tables)


def benchmark(quick: bool) -> dict[str, Any]:
    """Measure every shape; the result is plain JSON."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU, and none is visible to torch")
    device = torch.device("cuda", torch.cuda.current_device())
    rounds = 9 if quick else 25
    large, small = (
        [shapes[0], shapes[len(shapes) // 2], shapes[-2]] if quick else shapes for shapes in (SHAPES, SMALL)
    )
    with dispatch.use(mode="auto", strict=True):
        return {
            "machine": torch.cuda.get_device_name(device),
            "versions": {
                "vdit-quant": vdit_quant.__version__,
                "torch": str(torch.__version__),
                "triton": dispatch.triton_version(),
            },
            "launch_table": launch_table.in_use(device).split("/")[-1],
            "rounds": rounds,
            "copy_gb_s": copy_bandwidth(),
            "large": [measure(shape, large_paths(*shape), rounds) for shape in large],
            "small": [measure(shape, small_paths(*shape), rounds) for shape in small],
        }


def copy_bandwidth() -> float:
    """GB/s, bytes read and bytes written, of a device-to-device copy that no cache holds."""
    source = torch.randint(0, 256, (1 << 29,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = time_paths({"copy": lambda i: target.copy_(source)}, 4, 9)
    return 2 * source.numel() / times["copy"] / 1e3


def measure(shape: tuple[int, int, int], paths: dict[str, Path_], rounds: int) -> dict[str, Any]:
    """Check every path, then time them in turn."""
    m, n, k = shape
    errors = {}
    for name, (call, want, tolerance) in paths.items():
        got = call(0)
        errors[name] = float((got.float() - want.float()).norm() / want.float().norm())
        if not errors[name] <= tolerance:
            raise SystemExit(f"{name} at {shape}: relative error {errors[name]:.2e} is over {tolerance:.0e}")
    row = {"m": m, "n": n, "k": k, "error": errors}
    row["us"] = time_paths({name: call for name, (call, _, _) in paths.items()}, copies(n, k), rounds)
    print(shape, {name: round(us, 1) for name, us in row["us"].items()}, flush=True)
    torch.cuda.empty_cache()
    return row


def copies(n: int, k: int) -> int:
    return max(2, min(16, int(CACHE_BYTES // (n * k)) + 1))


def time_paths(calls: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """Median microseconds a call; the paths take turns, in a new order every round."""
    graphs, stream = {}, torch.cuda.Stream()
    for name, call in calls.items():
        with torch.cuda.stream(stream):
            call(0)
        stream.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], stream=stream):
            for i in range(count):
                call(i)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds + 1):
        random.Random(turn).shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if turn:  # the first round warms up
                times[name].append(start.elapsed_time(end) * 1e3 / count)
    return {name: statistics.median(found) for name, found in times.items()}


def encoded(weight: torch.Tensor, name: str) -> list[torch.Tensor]:
    """Codes, scales of rows and, where it has groups, their scales. Products take the time that their numbers ask for,
    as the power of a GPU is limited: every path multiplies the same matrices."""
    spec = LayerSpec.parse(name).weight
    return list(spec.resolve().encode(weight.float(), spec).values())


def large_paths(m: int, n: int, k: int) -> dict[str, Path_]:
    """Every way to multiply bf16 activations that were quantised before, bf16 out. One bias for all."""
    count = copies(n, k)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    w16 = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    w8, w4 = ([encoded(w, name) for w in w16] for name in ("w8", f"w4g{GROUP}"))
    codes, x_scale = quant_token(x)
    bf16 = torch.bfloat16

    def unpack_first(i: int) -> torch.Tensor:
        packed, scale, groups = w4[i]
        return int8_linear(codes, x_scale, int4_to_int8(packed, groups, k), scale, bias, bf16)

    def packed_product(i: int) -> torch.Tensor:
        packed, scale, groups = w4[i]
        return int4_linear(codes, x_scale, packed, scale, groups, bias, bf16)

    with dispatch.use(mode="reference", strict=False):
        want8 = int8_linear(codes, x_scale, *w8[0], bias, bf16)
        want4 = unpack_first(0)

    exact16 = (x.float() @ w16[0].float().t() + bias.float()).to(bf16)
    return {
        "bf16": (lambda i: F.linear(x, w16[i], bias), exact16, 1e-2),
        **fp8_paths(x, w16, bias),
        "w8a8": (lambda i: int8_linear(codes, x_scale, *w8[i], bias, bf16), want8, 0.0),
        "w4a8 unpacked": (unpack_first, want4, 0.0),
        "w4a8": (packed_product, want4, 0.0),
    }


def fp8_paths(x: torch.Tensor, w16: list[torch.Tensor], bias: torch.Tensor) -> dict[str, Path_]:
    """cuBLASLt with a scale a row, and the kernel here where there is one; nothing before compute capability 8.9."""
    if torch.cuda.get_device_capability() < (8, 9):
        return {}
    (xq, sx), weights = rows_to_fp8(x), [rows_to_fp8(w) for w in w16]
    want = (xq.float() * sx) @ (weights[0][0].float() * weights[0][1]).t() + bias.float()

    def scaled_mm(i: int) -> torch.Tensor:
        w, s = weights[i]
        return torch._scaled_mm(xq, w.t(), scale_a=sx, scale_b=s.t(), bias=bias, out_dtype=x.dtype, use_fast_accum=True)

    found: dict[str, Path_] = {"fp8 cuBLASLt": (scaled_mm, want, 1e-2)}
    if importlib.util.find_spec("vdit_quant.kernels.fp8_linear") is not None:
        fp8_linear = importlib.import_module("vdit_quant.kernels.fp8_linear").fp8_linear
        call = lambda i: fp8_linear(xq, sx[:, 0], weights[i][0], weights[i][1][:, 0], bias, x.dtype)  # noqa: E731
        found["fp8 here"] = (call, want, 1e-2)
    return found


def rows_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes [M, K] and their scales, float32 [M, 1]."""
    scale = x.float().abs().amax(1, keepdim=True) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def small_paths(m: int, n: int, k: int) -> dict[str, Path_]:
    """Float activations of few tokens: bf16, int8 and int4 weights."""
    count = copies(n, k)
    x, bias = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, device="cuda").bfloat16()
    w16 = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    w8, w4 = ([encoded(w, name) for w in w16] for name in ("w8", f"w4g{GROUP}"))
    packed, scale, groups = w4[0]
    decoded = int4_to_int8(packed, groups, k)
    want8, want4 = ((x.float() @ w.float().t() * s + bias.float()).to(x.dtype) for w, s in (w8[0], (decoded, scale)))
    return {
        "bf16": (
            lambda i: F.linear(x, w16[i], bias),
            (x.float() @ w16[0].float().t() + bias.float()).to(x.dtype),
            1e-2,
        ),
        "w8": (lambda i: int8_weight_linear(x, *w8[i], bias), want8, 1e-2),
        "w4": (lambda i: int4_weight_linear(x, *w4[i], bias), want4, 1e-2),
    }


def render(found: dict[str, Any]) -> str:
    """Both tables, with what their figures depend on."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    paths = list(dict.fromkeys(name for row in found["large"] for name in row["us"]))
    lines = [
        f"{found['machine']}; {versions}; launch table: {found['launch_table']}. Medians of "
        f"{found['rounds']} rounds in CUDA graphs, cold weights, groups of {GROUP} at 4 bits. A device copy reaches "
        f"{found['copy_gb_s']:.0f} GB/s.",
        "",
        "TFLOP/s:",
        "",
        "| M | N | K | " + " | ".join(paths) + " | w4a8 / w8a8 |",
        "|---:|---:|---:|" + "---:|" * (len(paths) + 1),
    ]
    for row in found["large"]:
        us, flop = row["us"], 2e-6 * row["m"] * row["n"] * row["k"]
        cells = [f"{flop / us[name]:.0f}" if name in us else "-" for name in paths]
        lines.append(_line([row["m"], row["n"], row["k"], *cells, f"{us['w8a8'] / us['w4a8']:.2f}"]))
    lines += ["", "Few tokens, weights only (adaLN); GB/s of stored weights, and time against bf16:", ""]
    lines += ["| M | N | K | bf16 | w8 | w4 | w8 | w4 |", "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    stored = {"bf16": 2.0, "w8": 1.0, "w4": 0.5 + 1 / GROUP}
    for row in found["small"]:
        us, weights = row["us"], row["n"] * row["k"]
        rates = [f"{stored[name] * weights / us[name] / 1e3:.0f}" for name in stored]
        lines.append(
            _line([row["m"], row["n"], row["k"], *rates, *(f"{us['bf16'] / us[w]:.2f}x" for w in ("w8", "w4"))])
        )
    return "\n".join(lines)


def _line(cells: list[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
