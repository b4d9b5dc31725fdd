"""Measures launch options on the GPU here, for the tables of `launch_table.py`.

A Triton twin takes part by naming ops in `TUNABLE` and by two functions: `candidates(op, m, n, k)`, launch options
worth measuring, and `example(op, m, n, k, device)`, random arguments of the op. One whose options depend on more than
m, n and k has a third, `facts(op, m, k)`: what it gives `lookup` beside them for such an example. Options whose result
is not that of the heuristics (exactly for integer sums, else within rounding) are dropped with a reason.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import dispatch, launch_table
from .launch_table import Entry, Facts, Key, Options, bucket, facts_of

Shape = tuple[int, int, int]
Report = Callable[[int, int, str], None]

TOKENS = (1, 16, 64, 512, 1024, 2048, 4096, 8192)
WIDTHS = {"DiT-XL/2, PixArt": 1152, "SD3.5-L": 2432, "FLUX": 3072}
RATIOS = ((3, 1), (1, 1), (4, 1), (1, 4), (6, 1))
"""(N, K) over the width: merged q, k and v, output projection, both feed-forward layers, modulation."""

CACHE_BYTES = 100e6
"""Weights are rotated until this many bytes have passed: in a model every layer finds its weight out of cache."""
REPEATS = 5
SECONDS = {"compile": 2.0, "measure": 0.1}
"""What one candidate costs, for the estimate before the first measurement."""


@dataclass(frozen=True)
class Task:
    """Launch options to measure for one op and one shape."""

    op: str
    m: int
    n: int
    k: int
    candidates: tuple[Options, ...]
    facts: Facts = ()


def known_shapes() -> list[Shape]:
    """The linear layers of known DiTs, at image sizes and batches in use."""
    layers = {(width * a, width * b) for width in WIDTHS.values() for a, b in RATIOS}
    return [(m, n, k) for n, k in sorted(layers) for m in TOKENS]


def layer_shapes(layers: Iterable[tuple[int, int]]) -> list[Shape]:
    """The layers [N, K] of a model at every number of tokens."""
    return [(m, n, k) for n, k in sorted(set(layers)) for m in TOKENS]


def plan(shapes: Iterable[Shape], ops: Iterable[str] | None = None, known: Iterable[Entry] = ()) -> list[Task]:
    """What to measure: every tunable op at every bucket, except what is `known` and what has one candidate.

    Raises KernelUnavailable where the kernels cannot be imported, and ValueError for an op that cannot be tuned.
    """
    tunable = dispatch.tunable()
    chosen = list(tunable if ops is None else ops)
    if not tunable:
        dispatch.twin(next(iter(dispatch.TWINS)))
    for op in chosen:
        if op not in tunable:
            raise ValueError(f"op {op!r} has no launch options to tune; those that do: {', '.join(tunable)}")
    done = {(e.m, e.key) for e in known}
    tasks: dict[tuple[int, Key], Task] = {}
    for op in chosen:
        twin = dispatch.twin(op)
        for m, n, k in shapes:
            rows = 1 if getattr(twin, "ANY_M", False) else bucket(m)
            options, facts = tuple(twin.candidates(op, rows, n, k)), facts_of(_facts(twin, op, rows, k))
            key = (rows, (op, n, k, facts))
            if len(options) > 1 and key not in done:
                tasks[key] = Task(op, rows, n, k, options, facts)
    return list(tasks.values())


def _facts(twin: ModuleType, op: str, m: int, k: int) -> dict[str, int | str]:
    return dict(twin.facts(op, m, k)) if hasattr(twin, "facts") else {}


def estimate(tasks: Iterable[Task]) -> float:
    """Seconds, roughly: every distinct kernel is compiled once, every candidate measured."""
    tasks = list(tasks)
    kernels = {(t.op, tuple(sorted(c.items()))) for t in tasks for c in t.candidates}
    return len(kernels) * SECONDS["compile"] + sum(len(t.candidates) for t in tasks) * SECONDS["measure"]


def tune(tasks: list[Task], device: torch.device, report: Report = lambda done, total, detail: None) -> Iterator[Entry]:
    """Measure the tasks one by one and yield the fastest options of each; nothing for one of which no candidate runs.

    report: called with candidates done, candidates in all, and a few words about the last shape
    """
    done, total = 0, sum(len(task.candidates) for task in tasks)
    for task in tasks:
        best, dropped = _fastest(task, device)
        done += len(task.candidates)
        shape = f"{task.op} {task.m}x{task.n}x{task.k}"
        if best is None:
            report(done, total, f"{shape}: no candidate runs ({dropped})")
            continue
        words = " ".join(f"{name}={value}" for name, value in best.options.items())
        report(done, total, f"{shape}: {best.us:.1f} us with {words}{dropped and f'; dropped: {dropped}'}")
        yield best


def _fastest(task: Task, device: torch.device) -> tuple[Entry | None, str]:
    """The best candidate, and why others were dropped."""
    run = dispatch.twin(task.op).run
    sets = _arguments(task, device)
    want = run(task.op, *sets[0])
    times: list[tuple[float, int]] = []
    dropped: dict[str, int] = {}
    for index, options in enumerate(task.candidates):
        with launch_table.forced(task.op, options):
            try:
                right = _agrees(run(task.op, *sets[0]), want)
                if right:
                    times.append((microseconds(lambda args: run(task.op, *args), sets), index))
                reason = "" if right else "wrong result"
            except Exception as error:
                # Options that do not compile or do not fit this GPU are out of the race; other errors are bugs.
                if not type(error).__module__.startswith("triton"):
                    raise
                reason = type(error).__name__
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
    words = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not times:
        return None, words
    us, index = min(times)
    return Entry(task.op, task.m, task.n, task.k, task.candidates[index], task.facts, us), words


def _arguments(task: Task, device: torch.device) -> list[tuple[Any, ...]]:
    twin = dispatch.twin(task.op)
    sets = [twin.example(task.op, task.m, task.n, task.k, device)]
    size = sum(t.numel() * t.element_size() for t in sets[0] if isinstance(t, Tensor))
    while len(sets) * size < CACHE_BYTES and len(sets) < 16:
        sets.append(twin.example(task.op, task.m, task.n, task.k, device))
    return sets


def _agrees(got: Tensor, want: Tensor) -> bool:
    if want.dtype == torch.int8:
        return torch.equal(got, want)
    wide = want.float()
    return bool((got.float() - wide).norm() <= 4e-3 * wide.norm())


def microseconds(call: Callable[[tuple[Any, ...]], Any], sets: list[tuple[Any, ...]]) -> float:
    """Median time of a call inside a CUDA graph that runs all argument sets, so that launching does not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(sets[0])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for args in sets:
            call(args)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    return statistics.median(times)
