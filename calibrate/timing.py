"""What a layer costs in milliseconds in each spec it may get, measured on the GPU that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from ..kernels.tuning import CACHE_BYTES, microseconds
from ..quantize.allocate import LayerCandidates
from ..quantize.errors import InputError
from ..quantize.format import Tensors
from ..quantize.layer import layer_layout
from ..quantize.recipe import CORE_ROLES
from ..quantize.spec import LayerSpec
from ..runtime.linear import CompressedLinear
from .plan import LayerPlan
from .progress import Progress

Timer = Callable[[int, int, int, LayerSpec], float]
"""(rows, N, K, spec) -> milliseconds of one call of such a layer."""

ROWS = 4096
MODULATION_ROWS = 2  # a modulation layer reads one row a sample
_COPIES = 16


def timed(
    table: Sequence[LayerCandidates], layers: Mapping[str, LayerPlan], timer: Timer, progress: Progress | None = None
) -> list[LayerCandidates]:
    """The table with milliseconds a call of every candidate, each shape and spec measured once. layers: by name."""
    progress = progress or Progress()
    found: dict[tuple[int, int, int, str], float] = {}
    out = []
    progress.stage("timing the candidates", len(table))
    for number, row in enumerate(table):
        layer = layers[row.layer]
        progress.advance(number, row.layer)
        rows = ROWS if layer.role in CORE_ROLES else MODULATION_ROWS
        times = []
        for candidate in row.candidates:
            key = (rows, layer.n, layer.k, candidate.spec)
            if key not in found:
                found[key] = timer(*key[:3], LayerSpec.parse(candidate.spec))
            times.append(dataclasses.replace(candidate, ms=found[key]))
        out.append(dataclasses.replace(row, candidates=tuple(times)))
    progress.advance(len(table), "all candidates")
    return out


def gpu_timer(device: torch.device, budget: str) -> Timer:
    """A timer of calls in bfloat16 inside a CUDA graph, so that launching does not count, with weights that are not in
    the cache. Raises InputError where there is no GPU: times of the CPU's stand-ins for the kernels mean nothing."""
    if device.type != "cuda":
        raise InputError(
            f"budget '{budget}': times are measured on a GPU, and this run is on the {device.type}; "
            'name one with --device, or give a size, such as "2.5x", "4.5bits" or "120MB"'
        )

    @torch.no_grad()
    def measure(rows: int, n: int, k: int, spec: LayerSpec) -> float:
        x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        tensors = _tensors(n, k, spec, device)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        layers = [_layer(n, k, spec, tensors) for _ in range(min(_COPIES, 1 + int(CACHE_BYTES / size)))]
        with torch.cuda.device(device):  # graphs and events are of the current one
            return microseconds(lambda args: args[0](x), [(layer,) for layer in layers]) / 1e3

    return measure


def _tensors(n: int, k: int, spec: LayerSpec, device: torch.device) -> Tensors:
    """Of a random weight: zeros would draw less power than a model does."""
    tensors = spec.weight.resolve().encode(torch.randn(n, k, device=device), spec.weight)
    rest = {name: t for name, t in layer_layout(n, k, spec).items() if name not in tensors}
    return {**tensors, **{name: torch.ones(t.shape, dtype=t.dtype, device=device) for name, t in rest.items()}}


def _layer(n: int, k: int, spec: LayerSpec, tensors: Tensors) -> CompressedLinear:
    device = next(iter(tensors.values())).device
    layer = CompressedLinear(k, n, spec, device=device, dtype=torch.bfloat16)
    layer.load_tensors({name: t.clone() for name, t in tensors.items()}, torch.zeros(n, device=device).bfloat16())
    return layer
