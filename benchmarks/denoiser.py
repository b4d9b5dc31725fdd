"""Speed and memory of whole denoisers, compressed against bf16, in one process with the order shuffled.

    python benchmarks/denoiser.py --json benchmarks/results/denoiser.json --markdown docs/benchmarks.md
    python benchmarks/denoiser.py --model dit-xl-b32 --way w8a8-graph --rounds 2

Weights are random: speed does not depend on them. Every timed path is checked in the same run, against the model in
fp32. `--render` writes the tables again from the JSON without measuring.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_models
import torch
from random_models import Shape, build, compressed, inputs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vdit_quant
from vdit_quant.runtime.fusion import fuse
from vdit_quant.runtime.graphs import replay_graphs

MODELS: dict[str, tuple[Shape, int, str]] = {
    "dit-xl-b32": (random_models.dit_xl(), 32, "DiT-XL/2, batch 32, 256 tokens"),
    "dit-xl-b2": (random_models.dit_xl(), 2, "DiT-XL/2, batch 2, 256 tokens"),
    "pixart-b2": (random_models.pixart_sigma(), 2, "PixArt-Sigma, batch 2, 4096 tokens"),
    "flux-b1": (random_models.flux(), 1, "FLUX-shaped, 4 + 8 blocks, batch 1, 4096 + 512 tokens"),
}
RECIPES = ("w8a8", "w4a8", "w4a8-mod4", "w4a4", "w3a8", "w2a8")
CUDNN = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PEERS = ("torchao-fp8", "torchao-int8", "bitsandbytes-nf4", "bitsandbytes-int8")
WAYS = (
    "bf16-eager", "bf16-compiled", "bf16-compiled-cudnn", "bf16-compiled-graph",
    *(f"{recipe}{way}" for recipe in RECIPES for way in ("", "-graph")), "w8a8-compiled", "w8a8-unfused",
    *PEERS,
)  # fmt: skip


@dataclass
class Path_:
    """One way to run a model: its module, how to call it, and what was measured."""

    name: str
    module: nn.Module
    call: Callable[[], Tensor]
    found: dict[str, Any]


def main() -> None:
    options = arguments().parse_args()
    if not options.render:
        found = {"machine": torch.cuda.get_device_name(), "versions": versions(), "models": {}}
        for name in options.model or MODELS:
            found["models"][name] = measure_model(name, options)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(render(json.loads(options.json.read_text(encoding="utf-8"))))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", choices=sorted(MODELS), help="may be given again. Default: all")
    add("--way", action="append", choices=WAYS, help="may be given again. Default: all")
    add("--rounds", type=int, default=5, help="rounds of ten forwards, each in a new order")
    add("--json", type=Path, default=Path("benchmarks/results/denoiser.json"))
    add("--render", action="store_true", help="measure nothing; print the tables of the JSON")
    return parser


def versions() -> dict[str, str]:
    import diffusers
    import triton

    return {
        "vdit-quant": vdit_quant.__version__, "torch": torch.__version__, "triton": triton.__version__,
        "diffusers": diffusers.__version__,
    }  # fmt: skip


def measure_model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every way of one model: error, first call, latency, memory."""
    shape, batch, label = MODELS[name]
    base = build(shape, torch.bfloat16, "cuda")
    call = inputs(shape, batch, torch.bfloat16, "cuda")
    truth = reference(shape, batch)
    ways = [way for way in options.way or WAYS]
    paths = []
    for way in ways:
        try:
            paths.append(prepare(way, base, call, truth))
            print(f"{name} {way}: {paths[-1].found}", flush=True)
        except Exception as error:  # one way that fails must not lose the others
            print(
                f"{name} {way}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True
            )
    times: dict[str, list[float]] = {path.name: [] for path in paths}
    for _ in range(options.rounds):
        for path in random.sample(paths, len(paths)):
            times[path.name] += time_calls(path.call, 10)
    rows = {p.name: {**p.found, "ms": statistics.median(times[p.name]), "ms_all": times[p.name]} for p in paths}
    result = {"label": label, "batch": batch, "bf16_bytes": bytes_of(base), "rows": rows}
    del paths, base
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return result


@torch.no_grad()
def reference(shape: Shape, batch: int) -> Tensor:
    """The output in fp32 of the very model that is measured in bf16."""
    model = build(shape, torch.bfloat16, "cuda").float()
    call = {
        k: v.float() if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v
        for k, v in inputs(shape, batch, torch.bfloat16, "cuda").items()
    }
    extra = call.get("added_cond_kwargs")
    if extra is not None:
        call["added_cond_kwargs"] = {k: v.float() for k, v in extra.items()}
    return model(**call)[0]


@torch.no_grad()
def prepare(way: str, base: nn.Module, arguments: dict[str, Any], truth: Tensor) -> Path_:
    """Builds one way, runs it for the first time, and checks it."""
    recipe, _, mode = way.partition("-")
    if way.startswith("w4a8-mod4"):
        recipe, mode = "w4a8-mod4", way.removeprefix("w4a8-mod4").lstrip("-")
    module, backends = base, None
    if recipe == "bf16":
        module.__dict__.pop("forward", None)
        backends = CUDNN if mode.endswith(("cudnn", "graph")) else None
        options = {"mode": "reduce-overhead"} if mode.endswith("graph") else {}
        run: Any = module if mode == "eager" else torch.compile(module, **options)
    elif way in PEERS:
        module = peer(way, base)
        run = module if way == "bitsandbytes-int8" else torch.compile(module)
    else:
        module = compressed(base, recipe)
        if mode != "unfused":
            fuse(module)
        if mode == "graph":
            replay_graphs(module)
        run = torch.compile(module, fullgraph=True) if mode == "compiled" else module

    @torch.no_grad()
    def call() -> Tensor:
        with attention(backends):
            return run(**arguments)[0]

    torch.cuda.synchronize()
    start = time.perf_counter()
    out = call().float()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    error = float((out - truth).norm() / truth.norm())
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    weights = bytes_of(module)
    found = {"first_call_s": first, "error": error, "weight_bytes": weights, "peak_bytes": weights + extra}
    return Path_(way, module, call, found)


def peer(way: str, base: nn.Module) -> nn.Module:
    """A copy of the model compressed by another library: every linear layer of at least 512 x 512."""
    model = copy.deepcopy(base)

    def is_large(module: nn.Module, _name: str = "") -> bool:
        return type(module) is nn.Linear and min(module.in_features, module.out_features) >= 512

    if way.startswith("torchao"):
        from torchao import quantization as ao

        fp8 = way.endswith("fp8")
        config = (
            ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
            if fp8
            else ao.Int8DynamicActivationInt8WeightConfig()
        )
        ao.quantize_(model, config, filter_fn=is_large)
        return model
    import bitsandbytes as bnb

    nf4 = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    for name, layer in [(n, m) for n, m in model.named_modules() if is_large(m)]:
        kind, more = (
            (bnb.nn.Linear4bit, nf4) if way.endswith("nf4") else (bnb.nn.Linear8bitLt, {"has_fp16_weights": False})
        )
        new = kind(layer.in_features, layer.out_features, layer.bias is not None, **more)
        new.load_state_dict({k: v.cpu() for k, v in layer.state_dict().items()})
        model.set_submodule(name, new.cuda())
    return model


def attention(backends: Any) -> AbstractContextManager[None]:
    return nullcontext() if backends is None else sdpa_kernel(backends, set_priority=True)


def bytes_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def time_calls(call: Callable[[], Tensor], count: int) -> list[float]:
    """Milliseconds of `count` single forwards, after one that is not counted."""
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def render(found: dict[str, Any]) -> str:
    """One table a model."""
    lines = []
    for model in found["models"].values():
        rows = model["rows"]
        graphed = {n for n in rows if n.endswith("graph")}
        plain = [r["ms"] for n, r in rows.items() if n.startswith("bf16-compiled") and n not in graphed]
        with_graph = [r["ms"] for n, r in rows.items() if n.startswith("bf16-compiled")]
        lines += [
            f"**{model['label']}**",
            "",
            "| | ms | x compiled bf16 | weights, GB | peak, GB | error | first call, s |",
        ]
        lines.append("|---|---:|---:|---:|---:|---:|---:|")
        for name, row in rows.items():
            best = min(with_graph if name in graphed else plain, default=float("nan"))
            lines.append(
                f"| {name} | {row['ms']:.2f} | {best / row['ms']:.2f} | {row['weight_bytes'] / 1e9:.2f} "
                f"| {row['peak_bytes'] / 1e9:.2f} | {row['error']:.4f} | {row['first_call_s']:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
