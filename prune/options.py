"""The settings of `prune_model`, and the defaults that depend on the model and the machine."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..evaluate.conditions import fingerprint
from ..evaluate.workload import check_guidance
from ..quantize.errors import InputError, unknown
from .budget import Duration
from .criterion import criterion_names, find_criterion
from .distill import Distillation
from .generate import Generation
from .latents import fingerprint_shards
from .optimizer import check_optimizer
from .trainer import Training

LARGEST_SEED = 2**32 - 1  # of a CPU generator's seed only the low 32 bits count
DISTILL = ("features", "output", "none")
# what a way of distilling has no use for
_UNUSED = {"none": ("output_weight", "features", "mask"), "output": ("features", "mask")}
# set apart from what the numbers follow from: none of these changes a weight
_ASIDE = ("resume", "overwrite", "grids", "save_steps", "device", "cache")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Options:
    """How to prune.

    keep        blocks to keep: "6", for several stacks "10,20" or "NAME=10" (see `plan.parse_keep`)
    criterion   which blocks stay: a file of `criteria/`
    plan        a prune plan (JSON), in the place of a criterion
    groups      N:M local groups of the learned criterion, such as ("1:2",)
    search      how long the learned criterion trains: steps or time
    recover     how long the pruned model trains: steps or time; "0" writes an initialisation
    distill     what recovery learns from: features and outputs of the teacher, its outputs, or none (fine-tuning)
    output_weight   weight of the teacher's outputs; the rest, of the diffusion loss. Default: 1, or 0.9 with `data`
    features    weight of the feature loss at the start of the run
    mask        sigmas beyond which activations are left out of the feature loss; None: none are
    samples, steps, guidance, conditions   how the teacher samples its own training data, without `data`
    cache       folder for that data, to be used by other runs as well; default: thrown away with the workspace
    batch_size  samples a step, over all processes. Default: what makes a step worth its launches
    micro_batch samples that go through the models at a time
    lr          peak learning rate of recovery. Default: 2e-4 for DiT-XL at 256 samples, by the square roots of
                batch size and width for others
    drop        share of samples trained without their condition
    ema, optimizer, checkpointing   see `Training`; checkpointing recomputes activations in the backward pass
    compile     whether blocks are compiled. Default: on a GPU, when the run is long enough to gain
    grids       pictures of samples during recovery
    save_steps  steps between checkpoints. Default: one a minute
    """

    keep: str = ""
    criterion: str = "learned"
    plan: str | None = None
    groups: tuple[str, ...] = ()
    search: str = "60s"
    recover: str = "8min"
    distill: str = "features"
    output_weight: float | None = None
    features: float = 0.02
    mask: float | None = 2.0
    samples: int | None = None
    steps: int = 25
    guidance: float = 1.0
    conditions: str | None = None
    cache: str | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    lr: float | None = None
    drop: float = 0.1
    ema: float | None = None
    optimizer: str = "adamw"
    checkpointing: bool = False
    compile: bool | None = None
    grids: int = 4
    seed: int = 0
    device: str | None = None
    save_steps: int | None = None
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raises InputError for a value that cannot be used."""
        Duration.parse(self.search, "--search ")
        Duration.parse(self.recover, "--recover ")
        check_optimizer(self.optimizer)
        if self.criterion not in criterion_names():
            raise unknown("criterion", self.criterion, criterion_names())
        if self.distill not in DISTILL:
            raise unknown("--distill", self.distill, DISTILL)
        for name, low, high in (("output_weight", 0, 1), ("drop", 0, 1), ("ema", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{_option(name)} {value}: expected {low} to {high}")
        for name in ("samples", "steps", "batch_size", "micro_batch", "lr", "mask"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{_option(name)} {value}: expected a number above 0")
        check_guidance(self.guidance)
        if self.cache is not None and Path(self.cache).exists() and not Path(self.cache).is_dir():
            raise InputError(f"--cache {self.cache}: expected a folder or nothing there, found a file")
        self._check_choice()
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"--seed {self.seed}: expected 0 to {LARGEST_SEED}")

    def _check_choice(self) -> None:
        """Raises InputError for options on which blocks stay that would be ignored, and for a search of no length."""
        told = {"group": bool(self.groups), "search": self.search != Options.search}
        trained = [name for name, is_given in told.items() if is_given]
        if self.plan is not None:
            chosen = trained if self.criterion == Options.criterion else ["criterion"]
            if chosen:
                raise InputError(f"--plan and --{chosen[0]}: give one of them, not both; a plan says which blocks stay")
        elif not find_criterion(self.criterion).trains:
            if trained:
                raise InputError(f"--{trained[0]} needs --criterion learned; '{self.criterion}' trains nothing")
        elif Duration.parse(self.search).is_none:
            raise InputError(f"--search: expected a positive number of steps or time, found {self.search}")

    def check_used(self, has_data: bool) -> None:
        """Raises InputError for an option that would change nothing."""
        told = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        unused = {
            "--data": ("samples", "steps", "guidance", "cache") if has_data else (),
            f"--distill {self.distill}": _UNUSED.get(self.distill, ()),
        }
        for option, names in unused.items():
            if name := next((name for name in names if name in told), None):
                raise InputError(f"{_option(name)} changes nothing beside {option}; leave it out")

    def generation(self, device: torch.device) -> Generation:
        samples = self.samples or (256 if device.type == "cpu" else 16_384)
        batch = min(64 if device.type == "cpu" else 1024, self.micro_batch or 1024)
        return Generation(samples, self.steps, self.guidance, self.seed, batch, self.conditions)

    def distillation(self, has_data: bool) -> Distillation:
        if self.distill == "none":
            return Distillation(0.0, 0.0, None)
        output = (0.9 if has_data else 1.0) if self.output_weight is None else self.output_weight
        return Distillation(output, self.features if self.distill == "features" else 0.0, self.mask)

    def training(self, budget: str) -> Training:
        return Training(
            Duration.parse(budget),
            ema=self.ema,
            optimizer=self.optimizer,
            micro=self.micro_batch,
            save_steps=self.save_steps,
        )

    def batch(self, elements: int, device: torch.device, processes: int = 1) -> int:
        """Samples a step for latents of so many elements: 256 for DiT-XL at 256 pixels on a GPU. Raises InputError for
        fewer than there are processes."""
        if self.batch_size is not None:
            if self.batch_size < processes:
                raise InputError(f"--batch-size {self.batch_size}: expected a sample for each of {processes} processes")
            return self.batch_size
        size = (1 << (14 if device.type == "cpu" else 20)) // elements
        return max(8, min(1024, size), processes)

    def rate(self, batch: int, width: int) -> float:
        return self.lr if self.lr is not None else 2e-4 * math.sqrt(batch / 256) * math.sqrt(1152 / width)

    def job(self, data: Any) -> dict[str, Any]:
        """The settings for a record: what the result follows from, of files and folders their contents.

        Raises InputError for a file or folder that cannot be read.
        """
        named = {name: value for name, value in asdict(self).items() if name not in _ASIDE}
        named["conditions"] = self.conditions and fingerprint(self.conditions)
        named["plan"] = self.plan and {"file": self.plan, "fingerprint": fingerprint(self.plan)}
        named["data"] = None if data is None else type(data).__name__
        if isinstance(data, str | Path):
            named["data"] = {"folder": str(data), "fingerprint": fingerprint_shards(data)}
        return named


def width_of(config: Any) -> int:
    """Channels of the residual stream, from a transformer's config."""
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    return int(heads * size) if heads and size else 1152
