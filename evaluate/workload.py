"""What is sampled, for statistics or for a comparison."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..quantize.errors import InputError
from .conditions import fingerprint
from .prompts import prompts_fingerprint
from .size import show_size

# A generator on a CPU uses 32 bits of its seed; calibration and training add millions to theirs.
MAX_SEED = 4_000_000_000


def check_guidance(scale: float | None) -> None:
    """Raises InputError for a guidance scale that is no number."""
    if scale is not None and not math.isfinite(scale):
        raise InputError(f"--guidance {scale}: expected a finite number")


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that samples cannot be numbered from."""
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"--seed {seed}: expected a whole number from 0 to {MAX_SEED}")


@dataclass(frozen=True)
class Workload:
    """What is sampled: `samples` conditions and noises drawn from `seed`, with the sampler's settings.

    guidance_scale  None: the pipeline's own default
    conditions      a conditions file (see `conditions.py`), for a bare transformer; None: the family's random ones
    dtype           name of the compute dtype; None: bfloat16 on an accelerator, float32 on a CPU
    prompts         a text file with a prompt on each line, for a pipeline; None: those that ship with the package
    size            (height, width) or (frames, height, width) in pixels, of a pipeline's samples; None: its own default
    offload         whether a full-precision denoiser is on the device a block at a time; it samples the same
    learn           whether a method learns from the samples: prompts that ship are then others than a comparison's
    """

    samples: int = 8
    steps: int = 20
    seed: int = 0
    guidance_scale: float | None = None
    batch_size: int = 16
    conditions: str | None = None
    dtype: str | None = None
    size: tuple[int, ...] | None = None
    prompts: str | None = None
    offload: bool = False
    learn: bool = False

    def __post_init__(self) -> None:
        check_guidance(self.guidance_scale)

    def to_dict(self) -> dict[str, Any]:
        """The settings for a record; files by their contents, wherever they lie."""
        # offload changes no sample, and whose record it is says who learns
        settings = {name: value for name, value in asdict(self).items() if name not in ("offload", "learn")}
        return {
            **settings,
            "conditions": self.conditions and fingerprint(self.conditions),
            "size": self.size and show_size(self.size),
            "prompts": self.prompts and prompts_fingerprint(self.prompts),
        }

    def generators(self, start: int, stop: int) -> list[torch.Generator]:
        """One CPU generator a sample, so that a sample's noise depends on nothing but its own number."""
        return [torch.Generator().manual_seed(self.seed * 1_000_003 + i) for i in range(start, stop)]

    def batch_seed(self, start: int) -> int:
        """Seed of what a batch draws from no generator of ours; below zero, where no sample's seed is."""
        return -1 - abs(self.seed * 1_000_003 + start)
