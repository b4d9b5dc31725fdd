"""What VQ4DiT costs on DiT-XL/2: one block of random weights compressed and trained, timed, and the whole extrapolated.

    python benchmarks/vq_cost.py --json benchmarks/results/vq-cost.json

Calls are those of 10 sampling steps of 8 samples with guidance, 256 tokens. Peak memory includes the model that is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import random_models
import torch
from torch import nn

import vdit_quant
from vdit_quant.quantize.recipe import load_shipped

BLOCKS = 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for bits in ("w2a16", "w3a16"):
        rows.append(measure(bits, options))
        found = {"device": options.device, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(bits: str, options: argparse.Namespace) -> dict[str, float | str]:
    """One and two blocks: their difference is what a block costs, free of what a run costs once."""
    seconds = {}
    for count in (1, 2):
        shape = random_models.dit_xl()
        shape = dataclasses.replace(shape, config={**shape.config, "num_layers": count})
        model = random_models.build(shape, torch.float32, options.device)
        inputs = random_models.inputs(shape, 2 * options.samples, torch.float32, options.device)

        def run(module: nn.Module, inputs: dict = inputs) -> None:
            for step in range(0, 1000, 100):
                module(**{**inputs, "timestep": torch.full_like(inputs["timestep"], 999 - step)})

        recipe = load_shipped(bits).with_params((f"steps={options.steps}",))
        if options.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "artifact"
            vdit_quant.compress(model, target, data=run, recipe=recipe, device=options.device, steps=10)
        seconds[count] = time.perf_counter() - start
    block = seconds[2] - seconds[1]
    whole = seconds[1] + (BLOCKS - 1) * block
    peak = torch.cuda.max_memory_allocated() / 1e9 if options.device.startswith("cuda") else float("nan")
    print(
        f"{bits}: {block:.1f} s a block, {whole / 60:.1f} min for {BLOCKS}; peak {peak:.2f} GB with two blocks",
        flush=True,
    )
    return {"bits": bits, "steps": options.steps, "block_seconds": block, "whole_seconds": whole, "peak_gb": peak}


if __name__ == "__main__":
    main()
