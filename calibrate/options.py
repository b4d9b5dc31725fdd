"""How to calibrate: every setting of a run, checked as far as it needs no model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ..evaluate.sampling import DenoiserSampler, PipelineSampler, load_scheduler
from ..evaluate.size import parse_size, size_arguments
from ..evaluate.workload import MAX_SEED, Workload, check_guidance
from ..quantize.allocate import Budget
from ..quantize.errors import InputError, unknown
from ..quantize.recipe import Recipe, load_shipped
from ..runtime.pipeline_folder import read_index
from ..runtime.source import Source

# Calibration draws its noise and conditions from here on, so that no comparison's seed repeats them.
CALIBRATION_SEEDS = 1_000_000
SENSITIVITIES = ("drift", "samples")


@dataclass(frozen=True)
class Options:
    """How to calibrate.

    bits        a shipped recipe: w8a8, w4a8, w4a4, w2a16, ...
    recipe      a recipe file or object, in the place of `bits`
    method      method for the attention and feed-forward layers, in the place of the recipe's
    group_size  weight group size, in the place of the recipe's
    params      "key=value" settings of that method
    budget      mixed precision: 4.5bits, 2.5x, 120MB or 3.2ms for all compressed layers together
    sensitivity how a layer's share of the error is measured for that: drift (cheap), or samples
    full_steps  how many first and last sampling steps run with activations in the compute dtype
    keep        globs of layers that keep their precision
    component   which denoiser of a pipeline that has two (Wan 2.2): transformer or transformer_2; None: the first
    steps, samples, seed, guidance   the sampling run that statistics are taken from
    size        of its samples in pixels, "512x768" or for videos "33x480x832"; None: the pipeline's own default
    batch_size  samples run at a time
    prompts     a text file with a prompt on each line, for a pipeline; None: those that ship with the package
    conditions  a conditions file for that run, for a bare transformer (see `evaluate/conditions.py`)
    device, dtype   where, and in which compute dtype, the model runs
    stats_gb    memory that statistics may take at a time; more blocks than fit mean more sampling runs.
                Default: half of what the model's weights take or of what the GPU has free beside the model, at least
                0.5 GB
    offload     one block of the model on the device at a time, for models that do not fit; slower, same artifact
    resume      go on where an interrupted run of the same settings stopped
    overwrite   replace an existing output
    i_know      use formats that are known to destroy a model that was not trained with them

    Raises InputError for fewer steps or samples than 1, a seed out of range, no size, no memory for statistics, an
    unknown sensitivity, one that no budget asks for, or a group size where a budget chooses formats.
    """

    bits: str = "w4a8"
    recipe: str | Path | Recipe | None = None
    method: str | None = None
    group_size: int | None = None
    params: tuple[str, ...] = ()
    full_steps: tuple[int, int] = (0, 0)
    budget: str | None = None
    sensitivity: str = "drift"
    keep: tuple[str, ...] = ()
    component: str | None = None
    steps: int = 20
    samples: int = 32
    seed: int = 0
    guidance: float | None = None
    size: str | None = None
    batch_size: int = 16
    prompts: str | None = None
    conditions: str | None = None
    device: str | None = None
    dtype: str | None = None
    stats_gb: float | None = None
    offload: bool = False
    resume: bool = False
    overwrite: bool = False
    i_know: bool = False

    def __post_init__(self) -> None:
        counts = (("steps", 1, None), ("samples", 1, None), ("batch_size", 1, None), ("seed", 0, MAX_SEED))
        for name, least, most in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or value < least or (most is not None and value > most):
                bounds = f"from {least}" if most is None else f"from {least} to {most}"
                raise InputError(f"--{name.replace('_', '-')} {value}: expected a whole number {bounds}")
        parse_size(self.size)
        check_guidance(self.guidance)
        if self.sensitivity not in SENSITIVITIES:
            raise unknown("--sensitivity", self.sensitivity, SENSITIVITIES)
        if self.sensitivity != Options.sensitivity and self.budget is None:
            raise InputError(f"--sensitivity {self.sensitivity} needs --budget; without one no layer is measured")
        if self.group_size is not None and self.budget is not None:
            raise InputError(f"--group-size {self.group_size}: --budget chooses the weight's format; give one of them")
        if self.stats_gb is not None and not self.stats_gb > 0:
            raise InputError(f"--stats-gb: expected a positive number, found {self.stats_gb:g}")

    def resolve_recipe(self) -> Recipe:
        if isinstance(self.recipe, Recipe):
            recipe = self.recipe
        else:
            recipe = load_shipped(self.bits) if self.recipe is None else Recipe.from_toml(self.recipe)
        recipe = recipe if self.method is None else recipe.with_method(self.method)
        recipe = recipe.with_params(self.params) if self.params else recipe
        recipe = recipe if self.group_size is None else recipe.with_group_size(self.group_size)
        if self.budget is not None:
            Budget.parse(self.budget)
            # a folded scale changes two layers at once, so a layer could not be measured alone
            recipe = recipe.without_folds()
        return recipe.with_keep(self.keep)

    def workload(self) -> Workload:
        seed = CALIBRATION_SEEDS + self.seed
        run = (self.samples, self.steps, seed, self.guidance, self.batch_size, self.conditions, self.dtype)
        return Workload(*run, parse_size(self.size), self.prompts, learn=True)


def check_workload(source: Source, workload: Workload) -> None:
    """Raises InputError, before weights are read, for conditions, prompts or a size that the source's own sampler does
    not take, and where it needs conditions and there are none."""
    if not source.is_pipeline:
        check_conditions(source, workload)
        return
    import diffusers

    kind = getattr(diffusers, read_index(source.root)["_class_name"])
    pipe = kind.__new__(kind)  # without its other components, which would have to be loaded
    setattr(pipe, source.component, _drawable(source.skeleton()))
    pipe.scheduler = None
    sampler = PipelineSampler(pipe, source.component)
    sampler.conditions(replace(workload, samples=1))
    size_arguments(workload.size, sampler.accepts, kind.__name__)


def check_conditions(source: Source, workload: Workload) -> None:
    """As `check_workload`, for the denoiser sampled by itself."""
    load_scheduler(source)
    DenoiserSampler(_drawable(source.skeleton()), None).conditions(replace(workload, samples=1))


def _drawable(skeleton: nn.Module) -> nn.Module:
    """The skeleton with embeddings of zeros, as families look up there which classes were trained."""
    for module in skeleton.modules():
        if isinstance(module, nn.Embedding):
            nn.init.zeros_(module.to_empty(device="cpu").weight)
    return skeleton


def parse_full_steps(text: str) -> tuple[int, int]:
    """ "FIRST,LAST" -> two counts. Raises InputError for anything else."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"--full-steps '{text}': expected FIRST,LAST, such as 2,1")
    return int(parts[0]), int(parts[1])
