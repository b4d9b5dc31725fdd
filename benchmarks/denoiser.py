"""Speed and memory of whole denoisers, compressed against bf16, in one process with the order shuffled.

    python benchmarks/denoiser.py                                   measure every model; add them to the JSON
    python benchmarks/denoiser.py --model dit-xl-b32                one model; the others in the JSON stay
    python benchmarks/denoiser.py --render --markdown docs/benchmarks.md --plot docs/images/denoiser.png
    python benchmarks/denoiser.py --model dit-xl-b2 --way w8a8 --way w8a8-graph --rounds 2 --json try.json

Weights are random: speed does not depend on them. Every timed path is checked in the same run: its error against the
model in fp32, and that of a fused path against the same compressed weights unfused, which must stay within twice
bf16's own error (of the model; for `COARSE` recipes, of the compressed weights). The script ends with status 1 when one
does not. The tables replace what stands between `<!-- denoiser:begin -->` and `<!-- denoiser:end -->`; `--render`
writes them from the JSON without measuring. A document with `<!-- speed:begin -->` gets one line a model there instead.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import random
import statistics
import time
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_models
import torch
from _render import plot_bars, rewrite, setting, table, versions
from random_models import Shape, build, compressed, inputs
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vdit_quant.runtime.fusion import fuse
from vdit_quant.runtime.graphs import replay_graphs

MODELS: dict[str, tuple[Shape, int, str]] = {
    "dit-xl-b32": (random_models.dit_xl(), 32, "DiT-XL/2, batch 32, 256 tokens"),
    "dit-xl-b2": (random_models.dit_xl(), 2, "DiT-XL/2, batch 2, 256 tokens"),
    "pixart-b2": (random_models.pixart_sigma(), 2, "PixArt-Sigma, batch 2, 4096 tokens"),
    "flux-b1": (random_models.flux(), 1, "FLUX-shaped, 4 + 8 blocks, batch 1, 4096 + 512 tokens"),
    "cogvideox-b1": (random_models.cogvideox(), 1, "CogVideoX-5B-shaped, 6 blocks, batch 1, 17550 + 226 tokens"),
}
RECIPES = (
    "w8a8", "w8a8-fp8", "w4a8", "w4a8-mod4", "w4a4", "fp4", "w3a8", "w2a8", "ternary-a8", "svdquant-w4a8",
    "svdquant-w4a4", "svdquant-fp4",
)  # fmt: skip
COARSE = ("w4a4", "fp4", "svdquant-w4a4", "svdquant-fp4")
"""Recipes whose activations have so few codes that what bf16 rounds flips many: their distance from unfused is held
against bf16's error with the same weights, not against that of the model."""
CUDNN = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PEERS = ("torchao-fp8", "torchao-int8", "bitsandbytes-nf4", "bitsandbytes-int8")
WAYS = (
    "bf16-eager", "bf16-compiled", "bf16-compiled-cudnn", "bf16-compiled-graph", "bf16-compiled-cudnn-graph",
    *(f"{recipe}{way}" for recipe in RECIPES for way in ("", "-graph")), "w8a8-compiled", "w8a8-compiled-graph",
    "w8a8-unfused", "svdquant-w4a8-unfused", *PEERS,
)  # fmt: skip


@dataclass
class Path_:
    """One way to run a model: its module, how to call it, what was measured, and about how long a forward takes."""

    name: str
    module: nn.Module
    call: Callable[[], Tensor]
    found: dict[str, Any]
    seconds: float = 0.0


def main() -> None:
    options = arguments().parse_args()
    # a graph that another back-end's attention was traced into must never be taken from a cache on disk
    functorch_config.enable_autograd_cache = False
    found = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {"models": {}}
    deadline = time.perf_counter() + options.limit
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
        picture = options.plot and ("Bars: how many times as fast as compiled bf16 each way is", options.plot)
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


def measure_model(name: str, options: argparse.Namespace, deadline: float = math.inf) -> Iterator[dict[str, Any]]:
    """Every way of one model: errors, first call, latency, memory; a way that fails is listed with its reason, and so
    is one that there was no time for. Once without other libraries, whose compilation can take longer than everything
    else, then with them."""
    shape, batch, label = MODELS[name]
    bench = Bench.of(shape, batch)
    ways = options.way or WAYS
    paths: list[Path_] = []
    failed: dict[str, str] = {}
    longest = {False: 0.0, True: 0.0}  # that any way has taken until it could be timed, compiled or not
    for part in ([way for way in ways if way not in PEERS], [way for way in ways if way in PEERS]):
        if not part:
            continue
        for way in part:
            begin, kind = time.perf_counter(), is_compiled(way)
            timing = sum(11 * options.rounds * path.seconds for path in paths)
            if begin + longest[kind] + timing > deadline:
                failed[way] = "no time was left"
                continue
            try:
                paths.append(bench.prepare(way))
                print(f"{name} {way}: {paths[-1].found}", flush=True)
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


def is_compiled(way: str) -> bool:
    """Whether torch.compile, which takes far longer than the rest, is part of a way."""
    return "compiled" in way or way in PEERS


def time_paths(paths: list[Path_], rounds: int) -> dict[str, dict[str, Any]]:
    """name -> what is known of the path, with the median of its forwards; the paths take turns in random order."""
    times: dict[str, list[float]] = {path.name: [] for path in paths}
    for _ in range(rounds):
        for path in random.sample(paths, len(paths)):
            times[path.name] += time_calls(path.call, 10)
    for path in paths:  # last: a profiler may slow down what runs after it
        path.found["attention"] = attention_kernel(path.call)
    return {p.name: {**p.found, "ms": statistics.median(times[p.name]), "ms_all": times[p.name]} for p in paths}


def release() -> None:
    """Frees compiled code, graphs and memory of what was measured."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def reference(shape: Shape, batch: int) -> Tensor:
    """The output in fp32 of the very model that is measured in bf16."""
    model = build(shape, torch.bfloat16, "cuda").float()
    return model(**in_float(inputs(shape, batch, torch.bfloat16, "cuda")))[0]


def in_float(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with fp32 tensors in the place of bf16's."""
    found = {k: v.float() if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v for k, v in call.items()}
    extra = found.get("added_cond_kwargs")
    return found if extra is None else found | {"added_cond_kwargs": {k: v.float() for k, v in extra.items()}}


class Bench:
    """One model in bf16 with its inputs, what it computes in fp32, and compressed copies, made when asked for."""

    def __init__(self, base: nn.Module, arguments: dict[str, Any], truth: Tensor) -> None:
        self.base, self.arguments, self.truth = base, arguments, truth
        self.compressed: dict[str, tuple[nn.Module, Tensor]] = {}
        self.own_errors: dict[str, float] = {}
        with torch.no_grad():
            self.bf16_error = relative(base(**arguments)[0], truth)

    @classmethod
    def of(cls, shape: Shape, batch: int) -> Bench:
        call = inputs(shape, batch, torch.bfloat16, "cuda")
        return cls(build(shape, torch.bfloat16, "cuda"), call, reference(shape, batch))

    @torch.no_grad()
    def unfused(self, recipe: str) -> tuple[nn.Module, Tensor]:
        """The compressed model, each layer by itself, and its output. Copy it before changing it."""
        if recipe not in self.compressed:
            module = compressed(self.base, recipe)
            self.compressed[recipe] = module, module(**self.arguments)[0]
        return self.compressed[recipe]

    @torch.no_grad()
    def allowed(self, recipe: str) -> float:
        """How far a fused way may be from its unfused reference."""
        if recipe not in COARSE:
            return 2 * self.bf16_error
        if recipe not in self.own_errors:
            original, own = self.unfused(recipe)
            exact = copy.deepcopy(original).float()(**in_float(self.arguments))[0]
            self.own_errors[recipe] = relative(own, exact)
        return 2 * self.own_errors[recipe]

    @staticmethod
    def recipe(way: str) -> str:
        """The recipe that the name of a way of ours begins with."""
        return max((name for name in RECIPES if way == name or way.startswith(f"{name}-")), key=len)

    @torch.no_grad()
    def prepare(self, way: str) -> Path_:
        """Builds one way, runs it for the first time, and checks it."""
        module, run, backends, own = self.module(way)

        @torch.no_grad()
        def call() -> Tensor:
            with attention(backends):
                return run(**self.arguments)[0]

        torch.cuda.synchronize()
        start = time.perf_counter()
        out = call().float()
        torch.cuda.synchronize()
        found: dict[str, Any] = {"first_call_s": time.perf_counter() - start, "error": relative(out, self.truth)}
        if own is not None:
            found |= {"from_unfused": relative(out, own), "allowed": self.allowed(self.recipe(way))}
        start = time.perf_counter()
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / 3
        weights = bytes_of(module)
        # a graph holds the memory of its forward all along, where no peak shows it
        peak = None if way.endswith("graph") else weights + working_bytes(call)
        return Path_(way, module, call, {**found, "weight_bytes": weights, "peak_bytes": peak}, seconds)

    def module(self, way: str) -> tuple[nn.Module, Any, list[SDPBackend] | None, Tensor | None]:
        """The module of a way, what to call, the attention back-ends to prefer (None: torch's own choice), and for a
        fused way the output of its unfused reference."""
        if way.startswith("bf16"):
            backends = CUDNN if "cudnn" in way else None
            mode = "reduce-overhead" if way.endswith("graph") else None
            run: Any = self.base if way == "bf16-eager" else compile_anew(self.base, mode=mode)
            return self.base, run, backends, None
        if way in PEERS:
            module = peer(way, self.base)
            return module, module if way == "bitsandbytes-int8" else compile_anew(module), None, None
        recipe = self.recipe(way)
        mode, (original, own) = way.removeprefix(recipe), self.unfused(recipe)
        if mode == "-unfused":
            return original, original, None, None
        module = fuse(copy.deepcopy(original))
        if mode == "-graph":
            replay_graphs(module)
        if not mode.startswith("-compiled"):
            return module, module, None, own
        inductor = "reduce-overhead" if mode.endswith("graph") else None
        return module, compile_anew(module, fullgraph=True, mode=inductor), None, own


_COMPILED = itertools.count()


def compile_anew(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` of a module or function, never sharing code with an earlier compilation of the same class.

    What dynamo compiled is kept by code object, and the order of attention back-ends is not among its guards: compiled
    as usual, the model with cuDNN first would silently run what was traced with torch's own choice.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"forward_{next(_COMPILED)}")
    own = types.FunctionType(code, globals(), code.co_name, None, forward.__closure__)
    return torch.compile(own, dynamic=False, **options)


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def working_bytes(call: Callable[[], Tensor]) -> int:
    """The most that one forward holds beyond what was held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def attention_kernel(call: Callable[[], Tensor]) -> str:
    """Whose attention kernel a forward really runs, by the names of its kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = " ".join(event.key.lower() for event in profile.key_averages())
    signs = {"cuDNN": "cudnn", "flash": "flash", "efficient": "fmha"}
    found = [name for name, sign in signs.items() if sign in names][:1]  # cuDNN's have "flash" in their names, too
    own = {"own": "attention_hopper_kernel", "own, few keys": "attention_kernel"}
    return ", ".join([*(name for name, sign in own.items() if sign in names), *found]) or "other"


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
    tensors = [part for whole in (*module.parameters(), *module.buffers()) for part in parts_of(whole)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def parts_of(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors of one that wraps others, as torchao does, or has more beside it, as bitsandbytes does."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts_of(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        yield from (t for t in state.as_dict().values() if isinstance(t, Tensor) and t.device == tensor.device)


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


def baselines(model: dict[str, Any]) -> tuple[float | None, float | None]:
    """ms of the fastest compiled bf16: without CUDA graphs, and of all where graphs were measured too."""
    compiled = {name: row["ms"] for name, row in model["rows"].items() if name.startswith("bf16-compiled")}
    plain = min((ms for name, ms in compiled.items() if not name.endswith("graph")), default=None)
    return plain, min(compiled.values()) if any(name.endswith("graph") for name in compiled) else None


def disagreeing(model: dict[str, Any]) -> list[str]:
    """The fused ways that are too far from their unfused references."""
    return [
        name for name, row in model["rows"].items() if "allowed" in row and not row["from_unfused"] <= row["allowed"]
    ]


def own_errors(model: dict[str, Any]) -> dict[str, float]:
    """Ways that are held against bf16's error with their own weights, and that error."""
    rows = {name: row["allowed"] / 2 for name, row in model["rows"].items() if name in COARSE and "allowed" in row}
    return {name: error for name, error in rows.items() if error != model["bf16_error"]}


def caption(model: dict[str, Any]) -> str:
    return (
        f"{setting(model)}. Random weights, one process, medians of {model['forwards']} forwards in rounds of shuffled "
        "order. The baseline is the faster of bf16 `torch.compile` with torch's own choice of attention kernel and "
        "with cuDNN's first; the second ratio lets it use CUDA graphs too."
    )


def render(found: dict[str, Any]) -> str:
    """One table a model, with what its figures depend on."""
    captions = list(dict.fromkeys(caption(model) for model in found["models"].values()))
    lines = [captions[0], ""] if len(captions) == 1 else []
    for model in found["models"].values():
        lines += [f"**{model['label']}**", ""]
        if len(captions) > 1:
            lines += [caption(model), ""]
        lines += [*model_table(model), ""]
        lines += [f"bf16's own error is {model['bf16_error']:.4f}: a fused way may be twice as far from unfused."]
        lines += [f"`{name}`: {error:.4f} with its own weights." for name, error in own_errors(model).items()]
        lines += [""]
        lines += [f"- `{way}` failed: {escape(reason)}" for way, reason in model["failed"].items()]
        lines += [""] if model["failed"] else []
    return "\n".join(lines).rstrip()


def summary(found: dict[str, Any]) -> str:
    """One line a model: times as fast as compiled bf16, which has CUDA graphs too where it was measured with them."""
    recipes = ("w8a8", "w4a8")
    rows = []
    for model in found["models"].values():
        plain, graphed = baselines(model)
        times = [model["rows"].get(f"{recipe}-graph", {}).get("ms") for recipe in recipes]
        if None not in times:
            label = model["label"] + (", CUDA graphs on both sides" if graphed else "")
            rows.append([label, *(f"{ratio(graphed or plain, ms)}x" for ms in times)])
    machine = next(iter(found["models"].values()))["machine"]
    return "\n".join([f"{machine}, random weights:", "", *table(["", *(r.upper() for r in recipes)], rows)])


def model_table(model: dict[str, Any]) -> list[str]:
    plain, graphed = baselines(model)
    wrong = disagreeing(model)
    rows = []
    for name, row in model["rows"].items():
        distance = f"{row['from_unfused']:.4f}" if "from_unfused" in row else ""
        cells = [name, f"{row['ms']:.2f}", ratio(plain, row["ms"]), ratio(graphed, row["ms"])]
        cells += ["-" if row[key] is None else f"{row[key] / 1e9:.2f}" for key in ("weight_bytes", "peak_bytes")]
        cells += [f"{row['error']:.4f}", f"**{distance}**, too far" if name in wrong else distance]
        rows.append([*cells, row["attention"], f"{row['first_call_s']:.1f}"])
    head = ["", "ms", "x compiled bf16", "x compiled bf16 with graphs", "weights, GB", "peak, GB", "error"]
    return table([*head, "from unfused", "attention", "first call, s"], rows)


def ratio(baseline: float | None, ms: float) -> str:
    return "-" if baseline is None else f"{baseline / ms:.2f}"


def escape(reason: str) -> str:
    """Text of an error on one line of Markdown."""
    return "`" + reason.replace("`", "'")[:160].strip() + "`"


def plot(found: dict[str, Any], path: Path) -> None:
    """Bars of how many times as fast as compiled bf16 each way is; dashed: compiled bf16 with graphs."""
    groups, marks = {}, {}
    for model in found["models"].values():
        plain, graphed = baselines(model)
        if plain is None:
            continue
        groups[model["label"]] = {name: plain / row["ms"] for name, row in model["rows"].items()}
        if graphed is not None:
            marks[model["label"]] = plain / graphed
    if not groups:
        raise SystemExit("nothing to plot: no model was measured with compiled bf16")
    plot_bars(groups, marks, "times as fast as compiled bf16 (dashed: bf16 with CUDA graphs)", path)


if __name__ == "__main__":
    main()
