"""What low-rank branches cost in a fused stage, piece by piece, on one GPU.

    python benchmarks/low_rank.py                 # every stage of the models below, rank 32 and 128
    python benchmarks/low_rank.py --model FLUX    # one model
    python benchmarks/low_rank.py --json FILE     # also write the figures

Microseconds, medians. `make`: norm or activation to int8 codes; `+ down`: and the same input through all
down-projections; `product`: int8 without branches; `+ up`: with them, as it is launched; `portable`: the same by the
portable Triton kernel; `added`: the up-projections as a 16-bit product, added to the residual, which the product
without branches then adds; `by itself`: input times D^T and U^T in torch and the sum with the product, layer by layer.
The last column is what branches add to a fused stage, in percent. Every result is compared with the torch reference.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _render import setting, table, versions
from torch import Tensor
from torch.nn import functional as F

from vdit_quant.kernels import int8_linear_low_rank as low_rank
from vdit_quant.kernels import launch_table
from vdit_quant.kernels import low_rank_down as down_module
from vdit_quant.kernels.act_quant import act_quant
from vdit_quant.kernels.int8_linear import int8_linear
from vdit_quant.kernels.int8_linear_add import int8_linear_add
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank
from vdit_quant.kernels.low_rank_down import act_down, norm_down
from vdit_quant.kernels.norm_quant import Norm, norm_quant

PORTABLE = {"BM": 128, "BN": 128, "BK": 128, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}
"""Any options for the portable kernel, which has its own for branches."""


@dataclass(frozen=True)
class Stage:
    """sizes: outputs of the layers; tokens: of a sample; act: None for a modulated LayerNorm before and no residual."""

    model: str
    name: str
    m: int
    k: int
    sizes: tuple[int, ...]
    tokens: int
    act: str | None


def stages() -> list[Stage]:
    found = []
    shapes = (("DiT-XL, batch 2", 512, 1152, 256), ("DiT-XL, batch 32", 8192, 1152, 256), ("FLUX", 4608, 3072, 4608))
    for model, m, k, tokens in shapes:
        found += [
            Stage(model, "q, k, v", m, k, (k, k, k), tokens, None),
            Stage(model, "attention's output", m, k, (k,), tokens, "none"),
            Stage(model, "up", m, k, (4 * k,), tokens, None),
            Stage(model, "down", m, 4 * k, (k,), tokens, "gelu_tanh"),
        ]
    return [*found, Stage("FLUX", "single: q, k, v, up", 4608, 3072, (3072, 3072, 3072, 12288), 4608, None)]


class Operands:
    """Random tensors of one stage, and the ways to run its pieces."""

    def __init__(self, stage: Stage, rank: int) -> None:
        self.stage, m, k, n = stage, stage.m, stage.k, sum(stage.sizes)
        layers, samples = len(stage.sizes), stage.m // stage.tokens

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").bfloat16()

        self.x, self.residual, self.gate = draw(m, k), draw(m, n), draw(samples, n)
        self.mod, self.bias = [draw(samples, k), draw(samples, k)], draw(n)
        self.down, self.up = draw(layers * rank, k) / k**0.5, draw(n, rank)
        self.signs = torch.ones(k, dtype=torch.int8, device="cuda")
        self.weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
        self.weight_scale = torch.rand(n, device="cuda") / (100 * k**0.5)
        each = torch.tensor(stage.sizes) // math.gcd(*stage.sizes)
        owner = torch.arange(layers, dtype=torch.uint8).repeat_interleave(each).cuda()
        self.low = self.project()
        self.branch = [self.low, self.up, *([owner] if layers > 1 else [])]
        self.codes, self.scale = self.make()

    def make(self) -> tuple[Tensor, Tensor]:
        if self.stage.act is None:
            return norm_quant(self.x, self.mod, [], [self.signs], "layer", 1e-6, 64, "sylvester")
        return act_quant(self.x, self.stage.act, None, self.signs, 64, "sylvester")

    def project(self) -> Tensor:
        if self.stage.act is None:
            return norm_down(self.x, self.mod, [], None, self.down, "layer", 1e-6)
        return act_down(self.x, self.stage.act, None, self.down)

    def made_twice(self) -> tuple[Tensor, Tensor, Tensor]:
        return *self.make(), self.project()

    def first(self) -> tuple[Any, ...]:
        return self.codes, self.scale, self.weight, self.weight_scale, self.bias

    def stream(self) -> list[Tensor]:
        return [] if self.stage.act is None else [self.residual, self.gate]

    def product(self) -> Tensor:
        if self.stage.act is None:
            return int8_linear(*self.first(), torch.bfloat16)
        return int8_linear_add(*self.first(), self.residual, self.gate)

    def with_up(self) -> Tensor:
        return int8_linear_low_rank(*self.first(), self.branch, self.stream(), torch.bfloat16)

    def portable(self) -> Tensor:
        with launch_table.forced("int8_linear" if self.stage.act is None else "int8_linear_add", PORTABLE):
            return self.with_up()

    def added(self) -> Tensor:
        pairs = zip(self.low.chunk(len(self.stage.sizes), 1), self.up.split(self.stage.sizes), strict=True)
        y = (
            torch.cat([low @ up.t() for low, up in pairs], dim=1)
            if len(self.stage.sizes) > 1
            else self.low @ self.up.t()
        )
        if self.stage.act is not None:
            y = torch.addcmul(self.residual, y, self.gate.repeat_interleave(self.stage.tokens, 0))
        return int8_linear_add(*self.first(), y, self.gate if self.stage.act is not None else None)

    def by_itself(self) -> Tensor:
        """As if x were what the branch reads, which a stage would have to write first."""
        pairs = zip(self.down.chunk(len(self.stage.sizes)), self.up.split(self.stage.sizes), strict=True)
        y = torch.cat([F.linear(F.linear(self.x, down), up) for down, up in pairs], dim=1)
        return self.product() + y

    def check(self) -> None:
        """Raises SystemExit unless all is close to the references."""
        want = low_rank._reference(*self.first(), self.branch, self.stream(), torch.bfloat16)
        norm = Norm(self.mod, [], "layer", 1e-6)
        args = (self.x, norm) if self.stage.act is None else (self.x, self.stage.act)
        reference = down_module._norm_reference if self.stage.act is None else down_module._act_reference
        rest = (None, self.down) if self.stage.act is None else (None, self.down, None)
        for got, expected in (
            (self.with_up(), want), (self.portable(), want), (self.low, reference(*args, *rest)),
        ):  # fmt: skip
            error = float((got.float() - expected.float()).norm() / expected.float().norm())
            if not error < 4e-3:
                raise SystemExit(f"{self.stage}: {error:.2e} from the reference")


def microseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median of `repeats`, in a CUDA graph, with the cache emptied of what the call reads before each."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="only stages of models whose name has this in it")
    parser.add_argument("--rank", type=int, action="append", help="may be given again. Default: 32 and 128")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for stage in stages():
        if options.model and options.model not in stage.model:
            continue
        for rank in options.rank or (32, 128):
            torch.manual_seed(0)
            run = Operands(stage, rank)
            run.check()
            calls = {
                "make": run.make, "+ down": run.made_twice, "product": run.product, "+ up": run.with_up,
                "portable": run.portable, "added": run.added, "by itself": run.by_itself,
            }  # fmt: skip
            rows.append({"model": stage.model, "stage": stage.name, "rank": rank})
            rows[-1] |= {name: microseconds(call) for name, call in calls.items()}
            print(rows[-1], flush=True)
    found = {"machine": torch.cuda.get_device_name(), "versions": versions(), "rows": rows}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(setting(found))
    print("\n".join(table([*rows[0], "%"], [cells(row) for row in rows])))


def cells(row: dict[str, Any]) -> list[str]:
    extra = row["+ down"] - row["make"] + row["+ up"] - row["product"]
    figures = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()]
    return [*figures, f"{100 * extra / (row['make'] + row['product']):.0f}"]


if __name__ == "__main__":
    main()
