"""What calibrating a big model costs: seconds and peak GPU memory, on a DiT of a given size with random weights.

    python benchmarks/calibration_cost.py --bits w4a8 --device cuda --json benchmarks/results/cost-dit-xl.json

The weights are random, so this says nothing about quality; time and memory do not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import vdit_quant

SIZES = {"DiT-XL/2": (28, 16, 72, 32), "DiT-B/2": (12, 12, 64, 32), "tiny": (2, 2, 32, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="DiT-XL/2")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        size = save_random_dit(model, *SIZES[options.size])
        cuda = options.device.startswith("cuda")
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        stages: dict[str, float] = {}
        start = time.perf_counter()
        vdit_quant.compress(
            model, Path(folder) / "out", bits=options.bits, device=options.device, progress=Stopwatch(stages)
        )
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if cuda else 0
    row = {
        "size": options.size,
        "bits": options.bits,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "seconds": seconds,
        "model_bytes_16_bit": size,
        "peak_bytes": peak,
        "peak_over_model": peak / size,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row), stages)


class Stopwatch:
    """Progress listener that notes when each stage began."""

    def __init__(self, stages: dict[str, float]) -> None:
        self.stages, self.start = stages, time.perf_counter()

    def stage(self, name: str, total: int) -> None:
        self.stages[name] = time.perf_counter() - self.start

    def advance(self, done: int, detail: str = "") -> None: ...

    def note(self, message: str) -> None:
        print(message, flush=True)


def save_random_dit(folder: Path, layers: int, heads: int, width: int, sample_size: int) -> int:
    """Writes a DiT with random bf16 weights; returns its bytes."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    config = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": sample_size,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "activation_fn": "gelu-approximate",
    }
    model = DiTTransformer2DModel(**config, attention_bias=True).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() * 2 for p in model.parameters())


if __name__ == "__main__":
    main()
