"""Attention alone: the op of this package beside every kernel that torch has for it, at the shapes of models in use.

    python benchmarks/attention.py --json benchmarks/results/attention.json --markdown docs/benchmarks.md

q, k and v are parts of one merged projection, or q is its own and k and v are those of a text. Inputs rotate through
more than the cache holds. The error of the op to float32 must stay within twice that of the best of torch's kernels.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _render
import producers
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdit_quant.kernels import attention, sdpa

PEERS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    masked: bool = False


CASES = (
    Case("PixArt, 1024 px", 2, 4096, 4096, 16, 72),
    Case("PixArt, 512 px", 8, 1024, 1024, 16, 72),
    Case("PixArt, text", 2, 4096, 300, 16, 72),
    Case("PixArt, padded text", 2, 4096, 300, 16, 72, True),
    Case("DiT-XL/2, batch 32", 32, 256, 256, 16, 72),
    Case("DiT-XL/2, batch 2", 2, 256, 256, 16, 72),
    Case("SD3, 1024 px", 2, 4429, 4429, 24, 64),
    Case("CogVideoX", 1, 17776, 17776, 48, 64),
    Case("FLUX, 1024 px", 1, 4608, 4608, 24, 128),
)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    shape, options = (case.heads, case.head_dim), {"device": "cuda", "dtype": torch.bfloat16}
    width = case.heads * case.head_dim
    if case.keys == case.queries:
        q, k, v = torch.randn(case.batch, case.queries, 3 * width, **options).chunk(3, 2)
    else:
        q = torch.randn(case.batch, case.queries, width, **options)
        k, v = torch.randn(case.batch, case.keys, 2 * width, **options).chunk(2, 2)
    mask = None
    if case.masked:
        hidden = torch.arange(case.keys, device="cuda") >= case.keys // 3
        mask = (hidden * -10000.0).to(torch.bfloat16).expand(case.batch, 1, 1, -1)
    return q.unflatten(2, shape), k.unflatten(2, shape), v.unflatten(2, shape), mask


def by_peer(backend: SDPBackend, *args: Any) -> Tensor:
    with sdpa_kernel([backend]):
        return attention.by_torch(*args)


def measure(case: Case) -> dict[str, Any]:
    """Microseconds of every way that takes the case. Raises SystemExit where the op's error is too large."""
    ways: dict[str, Callable[..., Tensor]] = {"here": attention.attend}
    ways |= {name: functools.partial(by_peer, backend) for name, backend in PEERS.items()}
    nbytes = 2 * case.batch * case.heads * case.head_dim * (2 * case.queries + 2 * case.keys)
    sets = [inputs(case) for _ in range(min(8, producers.sets_of(nbytes)))]
    exact = attention.by_torch(*(x if x is None else x[:1].float() for x in sets[0]))
    times, errors = {}, {}
    for name, way in ways.items():
        try:
            found = way(*sets[0])[: len(exact)].float()
        except RuntimeError:  # the backend does not take the case
            continue
        errors[name] = float((found - exact).norm() / exact.norm())
        times[name] = 1e6 * producers.seconds([functools.partial(way, *each) for each in sets])
    if errors["here"] > 2 * min(errors[name] for name in PEERS if name in errors):
        raise SystemExit(f"{case.name}: {errors}")
    backend = "Triton" if sdpa.supports("attention", *sets[0]) else "torch"
    return {**asdict(case), "backend": backend, "times": times, "errors": errors}


def render(found: dict[str, Any]) -> str:
    head = ["", "queries x keys", "heads x channels", "here, µs", "by", *(f"{name}, µs" for name in PEERS), "speed-up"]
    rows = []
    for row in found["rows"]:
        times = row["times"]
        peers = [times.get(name) for name in PEERS]
        rows.append([
            row["name"], f"{row['queries']} x {row['keys']}", f"{row['heads']} x {row['head_dim']}",
            f"{times['here']:.1f}", row["backend"], *("-" if t is None else f"{t:.1f}" for t in peers),
            f"{min(t for t in peers if t is not None) / times['here']:.2f}x",
        ])  # fmt: skip
    return "\n".join([f"{_render.setting(found)}. Medians.", "", *_render.table(head, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, default=Path("benchmarks/results/attention.json"))
    add("--markdown", type=Path, action="append", default=[], help="document with the marked region; may be repeated")
    add("--render", action="store_true", help="measure nothing; write the documents from the JSON")
    options = parser.parse_args()
    if not options.render:
        torch.manual_seed(0)
        rows = []
        for case in CASES:
            rows.append(measure(case))
            print(rows[-1], flush=True)
        found = {"machine": torch.cuda.get_device_name(), "versions": _render.versions(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = render(json.loads(options.json.read_text(encoding="utf-8")))
    for document in options.markdown:
        _render.rewrite(document, "attention", text)
    print(text)


if __name__ == "__main__":
    main()
