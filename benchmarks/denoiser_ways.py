"""The ways to run a model that `denoiser.py` compares: how each is built, checked and timed."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import statistics
import time
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from random_models import Shape, build, compressed, inputs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vdit_quant.runtime.fusion import fuse
from vdit_quant.runtime.graphs import replay_graphs

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


def is_compiled(way: str) -> bool:
    """Whether torch.compile, which takes far longer than the rest, is part of a way."""
    return "compiled" in way or way in PEERS


def is_captured(way: str) -> bool:
    """Whether a whole forward is one CUDA graph."""
    # int8 of bitsandbytes cannot be: it reads its outliers back in the middle of every layer
    return way.endswith("graph") or (way in PEERS and way != "bitsandbytes-int8")


def time_paths(paths: list[Path_], rounds: int) -> dict[str, dict[str, Any]]:
    """name -> what is known of the path, with the median of its forwards; the paths take turns in random order."""
    times: dict[str, list[float]] = {path.name: [] for path in paths}
    for _ in range(rounds):
        for path in random.sample(paths, len(paths)):
            times[path.name] += time_calls(path.call, 10)
    for path in paths:  # last: a profiler may slow down what runs after it
        path.found["attention"] = attention_kernel(path.call)
    return {p.name: {**p.found, "ms": statistics.median(times[p.name]), "ms_all": times[p.name]} for p in paths}


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
        peak = None if is_captured(way) else weights + working_bytes(call)
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
            if is_captured(way):
                replay_graphs(compile_blocks(module))
            return module, module, None, None
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


def compile_blocks(module: Any, **options: Any) -> Any:
    """Compiles what the blocks of a model share, once for each kind of block and apart from anything compiled before;
    returns the model."""
    blocks = [
        block for name in ("transformer_blocks", "single_transformer_blocks") for block in getattr(module, name, ())
    ]
    compiled = {kind: compile_anew(kind.forward, **options) for kind in {type(block) for block in blocks}}
    for block in blocks:
        block.forward = partial(compiled[type(block)], block)
    return module


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
