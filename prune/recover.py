"""Recovery: the pruned model trains to make up for the blocks that are gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..evaluate.picture import save_pairs
from ..evaluate.sampling import PipelineSampler
from ..evaluate.workload import Workload
from ..quantize.errors import InputError, OutputError
from ..runtime.source import load_pipeline, load_transformer
from .budget import Duration
from .compiling import compiled_blocks, rehearse
from .distill import Recovery, ask
from .objective import Batch
from .options import width_of
from .plan import PrunePlan
from .stream import Stream
from .student import build_student
from .trainer import Group, Listener, Trainer

if TYPE_CHECKING:
    from .pipeline import Run

_PICTURED, _PICTURE_STEPS = 8, 20
_WORTH_COMPILING = (120.0, 2000)  # seconds or steps of recovery from which compiling pays


@dataclass
class Outcome:
    """losses: of the held-out batch, right after pruning ("pruned") and at the end ("recovered")."""

    losses: dict[str, dict[str, float]]
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def recover(
    run: Run, teacher: nn.Module, plan: PrunePlan, stream: Stream, held: Batch, has_data: bool
) -> tuple[nn.Module, Outcome]:
    """The pruned model with the moving averages of its recovery, in eval mode, and how it went."""
    settings = run.settings
    student = build_student(load_transformer(run.source, torch.float32), plan).to(run.device)
    training = settings.training(settings.recover)
    outcome = Outcome({"pruned": measure(student, teacher, held, training.micro)})
    if training.duration.is_none:
        return student, outcome
    if settings.checkpointing:
        student.enable_gradient_checkpointing()
    loss = Recovery(student, teacher, plan.feature_pairs(), settings.distillation(has_data))
    rate = settings.rate(stream.batch_size, width_of(run.source.config))
    groups = [Group(rate, dict(student.named_parameters()))]
    models = {"teacher": teacher, "student": student}
    trainer = Trainer("recovery", groups, loss, stream, training, models, run.workspace, run.team)
    blocks = [(student, tuple(plan.kept_blocks())), (teacher, _blocks(plan))]
    grid = Grid(run, student, trainer)
    with loss, compiled_blocks(blocks, _compiles(run)) as remove:
        if _compiles(run):
            trainer.spent = rehearse(trainer.rehearse, remove, run.progress)
        trainer.run(Listener(run.progress, grid.on_step))
    with torch.no_grad():
        torch._foreach_copy_(trainer.parameters, trainer.averages)
    student.requires_grad_(False)
    outcome.losses["recovered"] = measure(student, teacher, held, training.micro)
    outcome.history, outcome.seconds = trainer.log.entries, round(trainer.seconds + trainer.spent, 1)
    return student, outcome


@torch.no_grad()
def measure(student: nn.Module, teacher: nn.Module, held: Batch, micro: int | None = None) -> dict[str, float]:
    """Mean losses on a batch, at most `micro` samples at a time: "diffusion" against the data, "output" against the
    teacher."""
    total = {"diffusion": 0.0, "output": 0.0}
    for part, share in held.split(min(64, micro or 64)):
        out = part.predict(student)
        total["diffusion"] += float(part.error(out)) * share
        total["output"] += float(F.mse_loss(out.float(), ask(teacher, part).float())) * share
    return {name: float(f"{value:.6g}") for name, value in total.items()}


def check_checkpointing(model: nn.Module) -> None:
    """Raises InputError for a model that cannot recompute its activations."""
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise InputError(f"--checkpointing: {type(model).__name__} does not support it")


class Grid:
    """Pictures of what the student samples beside the teacher, a few times during a run, for pipelines."""

    def __init__(self, run: Run, student: nn.Module, trainer: Trainer) -> None:
        self.run, self.student, self.trainer = run, student, trainer
        self.count = run.settings.grids if run.team.is_main and run.source.is_pipeline else 0
        self.images: Tensor | None = None

    def on_step(self, step: int, total: int) -> None:
        if self.count and step * self.count // total > (step - 1) * self.count // total:
            self.trainer.save_if_sound()  # a picture takes more memory than a step
            try:
                # eager: another batch size would be compiled for
                with self.trainer.averaged(), torch.compiler.set_stance("force_eager"):
                    self.draw(self.run.workspace.folder / f"samples-{step:06d}.png")
            except OutputError as error:
                self.count = 0
                self.run.progress.note(f"no more pictures on the way (--grids 0): {error}")

    def draw(self, path: Any) -> None:
        pipe = load_pipeline(self.run.source, torch.float32, self.run.device)
        workload = Workload(_PICTURED, _PICTURE_STEPS, batch_size=self.run.settings.micro_batch or _PICTURED)
        if self.images is None:
            self.images = PipelineSampler(pipe).run(workload).images
        pipe.register_modules(transformer=self.student)
        save_pairs(path, self.images, PipelineSampler(pipe).run(workload).images)


def _blocks(plan: PrunePlan) -> tuple[str, ...]:
    return tuple(f"{stack.name}.{i}" for stack in plan.stacks for i in range(stack.depth))


def _compiles(run: Run) -> bool:
    if run.settings.compile is not None:
        return run.settings.compile
    length = Duration.parse(run.settings.recover)
    long = (length.seconds or 0) >= _WORTH_COMPILING[0] or (length.steps or 0) >= _WORTH_COMPILING[1]
    return run.device.type == "cuda" and long
