"""Fused producers against the bandwidth of a copy, and against the unfused chain in torch, eager and compiled.

    python benchmarks/producers.py                      # measure, check, write the JSON and the table
    python benchmarks/producers.py --no-compiled        # the same without torch.compile of the chains
    python benchmarks/producers.py --variants           # time launch configurations instead; prints, writes nothing
    python benchmarks/producers.py --render             # write the table again from the JSON

A row's bytes are those that any implementation must move: every input read once, every output written once. The copy
moves as many, in the same process. Inputs rotate through more memory than the cache holds. Every timed result is
checked: codes within 1 of the torch reference, and no farther from float64 than the bfloat16 chain.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _render import rewrite
from torch import Tensor

from vdit_quant.kernels import act_quant as act_module
from vdit_quant.kernels import dispatch
from vdit_quant.kernels import norm_quant as norm_module
from vdit_quant.kernels.act_quant import act_quant
from vdit_quant.kernels.hadamard import hadamard_matrix
from vdit_quant.kernels.norm_quant import Norm, gate_norm_quant, norm_quant
from vdit_quant.kernels.transform import Transform, join_vectors

JSON = Path(__file__).parent / "results" / "producers.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CACHE_BYTES = 200 * 2**20
"""Inputs and outputs of all rotated sets together: several times the L2 cache."""


@dataclass(frozen=True)
class Case:
    """One producer at one shape. transform: "", "s" (channel scale), "sh64", "sh128" (also signs and rotation)."""

    model: str
    op: str
    m: int
    k: int
    tokens: int
    transform: str

    @property
    def block_size(self) -> int:
        return int(self.transform.partition("h")[2] or 0)

    @property
    def bytes(self) -> int:
        """Bytes that must move: bfloat16 in, int8 out; the gated form reads a second tensor and writes a third."""
        return self.m * (self.k * (7 if self.op == "gate" else 3) + 4)


MODELS = (
    ("DiT-XL, PixArt", 8192, 1152, 4608, 256),
    ("FLUX", 4608, 3072, 12288, 4608),
    ("Wan 14B", 8192, 5120, 13824, 8192),
    ("one small image", 512, 1152, 4608, 256),
)
ALL = ("", "s", "sh64", "sh128")
TRANSFORMS = {"norm": ALL, "gate": ("", "sh64", "sh128"), "none": ("", "sh64")}
PREFIX = 3072
"""Columns of attention's output that come before those of the feed-forward network in a single block of FLUX."""


def cases() -> Iterator[Case]:
    for model, m, k, wide, tokens in MODELS:
        for op in ("norm", "gate", "none"):
            for transform in TRANSFORMS[op]:
                yield Case(model, op, m, k, tokens, transform)
        for transform in ALL:
            yield Case(model, "gelu_tanh", m, wide, tokens, transform)
        if model == "FLUX":
            for transform in ("", "sh64"):
                yield Case(model, "prefixed", m, PREFIX + wide, tokens, transform)


class Operands:
    """Random inputs of a case and the four ways to run it."""

    def __init__(self, case: Case, device: str = "cuda", m: int | None = None) -> None:
        self.case, m = case, m or case.m
        k, samples = case.k, max(1, m // case.tokens)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).bfloat16()

        self.x, self.branch = draw(m, k) * 2 + 0.5, draw(m, k) if case.op == "gate" else None
        self.prefix: Tensor | None = None
        if case.op == "prefixed":
            self.prefix, self.x = draw(m, PREFIX), draw(m, k + 2 * PREFIX)[:, 3 * PREFIX :]
        self.shift, self.scale, self.gate = draw(samples, 6 * k).chunk(6, dim=1)[:3]
        self.pre_scale = torch.rand(k, device=device) + 0.5 if "s" in case.transform else None
        signed = "h" in case.transform
        self.signs = (torch.randint(2, (k,), device=device) * 2 - 1).to(torch.int8) if signed else None
        self.vectors = join_vectors(self.pre_scale, self.signs)  # once, as when a model is loaded
        self.h = hadamard_matrix(case.block_size, "sylvester").to(device) if signed else None
        self.transform = Transform(self.pre_scale, self.signs, case.block_size, "sylvester", torch.int8)
        self.norm = Norm([self.shift, self.scale], [], "layer", 1e-6)

    def fused(self) -> tuple[Tensor, ...]:
        case, last = self.case, (self.case.block_size, "sylvester")
        if case.op not in ("norm", "gate"):
            act = "none" if case.op == "none" else "gelu_tanh"
            return act_quant(self.x, act, *self.vectors, *last, prefix=self.prefix)
        vectors = [t for t in self.vectors if t is not None]
        args = (self.norm.mod, [], vectors, "layer", 1e-6, *last)
        if case.op == "norm":
            return norm_quant(self.x, *args)
        return gate_norm_quant([self.x, self.branch, self.gate], *args)

    def reference(self) -> tuple[Tensor, ...]:
        if self.case.op not in ("norm", "gate"):
            act = "none" if self.case.op == "none" else "gelu_tanh"
            return act_module._reference(self.x, act, self.transform, self.prefix)
        if self.case.op == "norm":
            return norm_module._reference(self.x, self.norm, self.transform)
        return norm_module._gate_reference(self.x, [self.branch, self.gate], self.norm, self.transform)

    def inputs(self) -> tuple[Tensor | None, ...]:
        branch = self.prefix if self.branch is None else self.branch
        return (self.x, branch, self.gate, self.shift, self.scale, self.pre_scale, self.signs, self.h)


def transformed(case: Case, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """What is quantised, in the dtype of x as a model computes it, and the residual stream if there is one."""
    x, branch, gate, shift, scale, pre_scale, signs, h = inputs
    stream = None
    if case.op in ("norm", "gate"):
        b, k = len(shift), x.shape[1]
        x = x.view(b, -1, k)
        if case.op == "gate":
            x = stream = x + gate[:, None] * branch.view(b, -1, k)
        x = (F.layer_norm(x, (k,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]).view(-1, k)
        stream = None if stream is None else stream.view(-1, k)
    elif case.op != "none":
        x = F.gelu(x, approximate="tanh")
    if case.op == "prefixed":
        x = torch.cat([branch, x], dim=1)
    if pre_scale is not None:
        x = x * pre_scale.to(x.dtype)
    if h is not None:
        x = x * signs.to(x.dtype)
        x = (x.view(-1, len(h)) @ h.to(x.dtype) * len(h) ** -0.5).view(x.shape)
    return x, stream


def chain(case: Case, *inputs: Any) -> tuple[Tensor, ...]:
    """The unfused form: one torch operation after another, then symmetric codes per token."""
    y, stream = transformed(case, inputs)
    wide = y.float()
    amax = wide.abs().amax(dim=1).clamp_min(1e-30)
    codes = torch.round(wide * (127 / amax)[:, None]).to(torch.int8)
    return (codes, amax / 127) if stream is None else (stream, codes, amax / 127)


def check(
    case: Case, operands: Operands, unfused: Callable[..., tuple[Tensor, ...]], slack: float = 1.0001
) -> dict[str, float]:
    """Errors of the fused codes and of the chain's to float64. Raises SystemExit where the fused ones are worse."""
    wide = tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in operands.inputs())
    found, reference = operands.fused(), operands.reference()

    def error(result: tuple[Tensor, ...]) -> float:
        exact = wide
        if case.op == "gate":  # what follows the residual is compared for the residual as it was stored
            torch.testing.assert_close(result[0], reference[0], rtol=2**-6, atol=2**-6)
            exact = (result[0].double(), torch.zeros_like(wide[1]), *wide[2:])
        want, _ = transformed(case, exact)
        return float((result[-2].double() * result[-1].double()[:, None] - want).norm() / want.norm())

    off = int((found[-2].int() - reference[-2].int()).abs().max())
    flips = float((found[-2] != reference[-2]).double().mean())
    errors = {"error": error(found), "chain_error": error(unfused(*operands.inputs())), "flips": flips}
    if off > 1 or not errors["error"] <= errors["chain_error"] * slack:
        raise SystemExit(f"{case}: codes are off by up to {off}, {errors}")
    return errors


def seconds(calls: list[Callable[[], Any]], repeats: int = 15) -> float:
    """Median seconds of one call, from replays of one graph that makes every call once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return statistics.median(times)


def sets_of(nbytes: int) -> int:
    return max(2, min(64, -(-CACHE_BYTES // nbytes)))


def copy_seconds(nbytes: int) -> float:
    """Seconds of a copy that reads nbytes / 2 and writes as many."""
    pairs = [[torch.randint(255, (nbytes // 2,), device="cuda", dtype=torch.uint8) for _ in range(2)]]
    pairs += [[pairs[0][0].clone(), pairs[0][1].clone()] for _ in range(sets_of(nbytes) - 1)]
    return seconds([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs])


def host_seconds(call: Callable[[], Any], calls: int = 200) -> float:
    """Median seconds that the host needs to launch once, the device keeping up."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def measure(case: Case, compiled: bool) -> dict[str, Any]:
    rotated = [Operands(case) for _ in range(sets_of(case.bytes))]

    def unfused(*inputs: Any) -> tuple[Tensor, ...]:
        return chain(case, *inputs)

    row: dict[str, Any] = {**vars(case), "bytes": case.bytes, **check(case, rotated[0], unfused)}
    row["copy"] = copy_seconds(case.bytes)
    row["fused"] = seconds([each.fused for each in rotated])
    if case.m < 1000:
        row["host"] = host_seconds(rotated[0].fused)
    row["eager"] = seconds([lambda each=each: unfused(*each.inputs()) for each in rotated[:8]])
    if compiled and case.transform in ("", "sh128") and (case.m > 1000 or case.transform == ""):
        torch._dynamo.reset()
        fast = torch.compile(unfused, dynamic=False)
        check(case, rotated[0], fast, slack=1.02)  # compiled, much of the chain is fp32 too
        row["compiled"] = seconds([lambda each=each: fast(*each.inputs()) for each in rotated])
    print(line(row), flush=True)
    return row


def line(row: dict[str, Any]) -> str:
    rate = row["bytes"] / row["fused"] / 1e9
    others = "  ".join(f"{name} {row[name] * 1e6:8.1f}" for name in ("host", "eager", "compiled") if name in row)
    return (
        f"{row['model']:16} {row['op']:9} {row['m']:5}x{row['k']:<5} {row['transform']:5} {row['fused'] * 1e6:7.1f} us "
        f"{rate:6.0f} GB/s {row['copy'] / row['fused']:5.2f} of copy ({row['copy'] * 1e6:.1f})  {others}  "
        f"error {row['error']:.5f} (chain {row['chain_error']:.5f}) flips {row['flips']:.4f}"
    )


def configurations(case: Case) -> list[dict[str, Any]]:
    """Overrides of `gluon_producers.launch_options` to try at a case."""
    shapes = {
        1152: [(2, 1, (128, 168)), (4, 2, (112, 144))],
        3072: [(2, 2, (128,)), (1, 2, (96,))],
        4608: [(1, 2, (96, 112)), (1, 4, (64, 80))],
        5120: [(2, 4, (112, 144)), (1, 2, (128, 144))],
    }.get(case.k, [(1, 8, (96, 112)), (1, 16, (64,))])
    found: list[dict[str, Any]] = []
    for r, warps, most in shapes:
        found += [{"R": r, "num_warps": warps, "maxnreg": registers} for registers in most]
    if case.block_size:
        found += [{"PRODUCT": False, "HELD": held} for held in (8, 16, 32)]
    return [{}, *found]


def configure(changes: dict[str, Any]) -> None:
    """Launch with `changes` from here on."""
    from vdit_quant.kernels._triton import gluon_producers

    original = getattr(gluon_producers.launch_options, "original", gluon_producers.launch_options)

    @functools.cache
    def launch_options(*given: Any, **more: Any) -> dict[str, Any]:
        return {**original(*given, **more), **changes}

    launch_options.original = original  # type: ignore[attr-defined]
    gluon_producers.launch_options = launch_options
    gluon_producers.limits.cache_clear()


def variants(only: str | None) -> None:
    """Times every configuration of the cases that matter; one that fails says so."""
    tried = {"norm": ("", "sh64", "sh128"), "gate": ("sh64",), "gelu_tanh": ("", "sh64"), "prefixed": ("sh64",)}
    chosen = [case for case in cases() if case.model != "one small image" and case.transform in tried.get(case.op, ())]
    chosen = [case for case in chosen if not only or only in f"{case.op} {case.m}x{case.k} {case.transform}"]
    warm_up([(case, changes) for case in chosen for changes in configurations(case)])
    for case in chosen:
        rotated = [Operands(case) for _ in range(sets_of(case.bytes))]
        copy, want = copy_seconds(case.bytes), rotated[0].reference()
        print(f"{case.op} {case.m}x{case.k} {case.transform}: copy {copy * 1e6:.1f} us", flush=True)
        for changes in configurations(case):
            configure(changes)
            try:
                off = (rotated[0].fused()[-2].int() - want[-2].int()).abs().max()
                spent = seconds([each.fused for each in rotated])
                print(f"  {copy / spent:5.2f} {spent * 1e6:7.1f} us  off by {int(off)}  {changes}", flush=True)
            except Exception as error:
                print(f"  failed: {type(error).__name__} {str(error)[:90]!r}  {changes}", flush=True)
        configure({})


def compile_one(item: tuple[Case, dict[str, Any]]) -> None:
    """In a process of its own: compile the kernel of a case into Triton's cache on disk."""
    case, changes = item
    configure(changes)
    try:
        with dispatch.use(strict=True):
            Operands(case).fused()
    except Exception as error:
        print(f"{case} {changes}: {type(error).__name__}", file=sys.stderr)


def warm_up(work: list[tuple[Case, dict[str, Any]]]) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(12, mp_context=context) as pool:
        list(pool.map(compile_one, work))


def render(found: dict[str, Any]) -> str:
    """The table, under the machine that it was measured on."""
    names = {"norm": "LayerNorm, modulate", "gate": "gated residual, LayerNorm, modulate", "none": "nothing"}
    names["prefixed"] = "[attention, GELU (tanh)]"
    kinds = {"": "none", "s": "scale", "sh64": "scale, H64", "sh128": "scale, H128"}
    lines = [
        f"{found['machine']}; torch {found['torch']}, Triton {found['triton']}. Medians; {found['method']}.",
        "",
        "| before the codes | M x K | transform | µs | GB/s | of a copy | eager | compiled | error (bf16 chain) |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        compiled = f"{row['compiled'] / row['fused']:.1f}x" if "compiled" in row else ""
        lines.append(
            f"| {names.get(row['op'], 'GELU (tanh)')} | {row['m']} x {row['k']} | {kinds[row['transform']]} "
            f"| {row['fused'] * 1e6:.1f} | {row['bytes'] / row['fused'] / 1e9:.0f} "
            f"| {100 * row['copy'] / row['fused']:.0f} % | {row['eager'] / row['fused']:.1f}x | {compiled} "
            f"| {100 * row['error']:.3f} % ({100 * row['chain_error']:.3f} %) |"
        )
    return "\n".join(lines)


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    chosen = [case for case in cases() if not options.only or options.only in f"{case.op} {case.m}x{case.k}"]
    warm_up([(case, {}) for case in chosen])
    with dispatch.use(strict=True):
        rows = [measure(case, options.compiled) for case in chosen]
    return {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": dispatch.triton_version(),
        "method": "CUDA graphs over inputs that rotate through more than the cache holds",
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, default=JSON)
    add("--markdown", type=Path, action="append", default=[], help="document with the marked region; may be repeated")
    add("--only", help='cases whose "op MxK" contains this')
    add("--no-compiled", dest="compiled", action="store_false", help="leave out torch.compile of the chains")
    add("--variants", action="store_true", help="time launch configurations; writes nothing")
    add("--render", action="store_true", help="measure nothing; write the document from the JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.variants:
        variants(options.only)
        return
    if not options.render:
        found = benchmark(options)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    else:
        options.markdown = options.markdown or [DOCUMENT]
    table = render(json.loads(options.json.read_text(encoding="utf-8")))
    for document in options.markdown:
        rewrite(document, "producers", table)
    print(table)


if __name__ == "__main__":
    main()
