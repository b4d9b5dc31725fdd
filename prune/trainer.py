"""The training loop that search and recovery share: clipped AdamW, EMA, resumable to the bit, stopped by NaN."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.progress import Progress
from ..calibrate.workspace import Workspace
from .budget import Duration
from .diverged import Diverged, first_nonfinite
from .log import TrainingLog
from .objective import Batch
from .optimizer import make_optimizer, pack_state, unpack_state
from .stream import Stream, step_generator
from .team import Team

_TIMED = 10  # steps timed, at most, before a budget in seconds becomes a number of steps


@dataclass(frozen=True)
class Moment:
    """Where a run is: step of total. `generator` is this step's and this process's own."""

    step: int
    total: int
    generator: torch.Generator

    @property
    def fraction(self) -> float:
        return self.step / self.total


@dataclass(frozen=True)
class Training:
    """How a stage trains.

    duration   how long
    warmup     steps over which the rate rises, at most a tenth of the run; then a cosine down to `floor` of it
    clip       largest norm of the gradient of all parameters together
    ema        decay of the moving average; None: it spans a twentieth of the run
    optimizer  adamw, or adamw8bit (bitsandbytes)
    micro      samples that go through the model at a time; None: a process's whole share
    save       seconds between checkpoints, or steps where `save_steps` is given
    """

    duration: Duration
    warmup: int = 100
    floor: float = 0.02
    clip: float = 1.0
    ema: float | None = None
    optimizer: str = "adamw"
    micro: int | None = None
    save: float = 60.0
    save_steps: int | None = None


@dataclass(frozen=True)
class Group:
    """Parameters by name that share a peak learning rate."""

    lr: float
    parameters: dict[str, nn.Parameter]


@dataclass
class Listener:
    """Where a run's news go: stages and notes to `progress`; `on_step(step, total)` is called between steps."""

    progress: Progress = field(default_factory=Progress)
    on_step: Callable[[int, int], None] | None = None


Loss = Callable[[Batch, Moment], dict[str, Tensor]]


class Trainer:
    """Trains `groups` on a loss that returns {"loss": what is minimised, ...: parts to log}.

    models  those that take part, by role, for naming the layer where a number stops being finite
    """

    def __init__(
        self,
        stage: str,
        groups: Sequence[Group],
        loss: Loss,
        stream: Stream,
        settings: Training,
        models: dict[str, nn.Module],
        workspace: Workspace,
        team: Team | None = None,
    ) -> None:
        self.stage, self.groups, self.loss, self.stream = stage, list(groups), loss, stream
        self.settings, self.models, self.workspace = settings, models, workspace
        self.team = team or Team()
        self.named = {name: p for group in groups for name, p in group.parameters.items()}
        self.parameters: list[Tensor] = list(self.named.values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizer = make_optimizer(settings.optimizer, [(g.lr, list(g.parameters.values())) for g in groups])
        self.step, self.total = 0, 0
        self.log = TrainingLog()
        self.kept = 0  # the step that a resumed run goes on after
        self.seconds = self.spent = 0.0  # spent: of a budget in seconds, on preparations

    def run(self, listener: Listener) -> None:
        """Trains to the end, from the last checkpoint in the workspace where there is one.

        Raises Diverged, with the last state saved that is worth going on from, when a gradient is not finite, and
        InputError for a checkpoint that cannot be read.
        """
        before = self._restore()
        start = saved = time.monotonic()
        if not self.total:
            self.total = self._steps()
        listener.progress.stage(self.stage, self.total)
        first, began = self.step, time.monotonic()
        while self.step < self.total:
            parts = self._train()
            self.seconds = before + time.monotonic() - start
            rate = self.optimizer.param_groups[0]["lr"]
            self.log.add(parts, self.step, self.total, lr=rate, seconds=round(self.seconds, 2))
            listener.progress.advance(self.step, self.log.detail(self.step - first, began))
            if self._is_due(saved):
                self.save_if_sound()
                saved = time.monotonic()
            if listener.on_step is not None:
                listener.on_step(self.step, self.total)
        self.seconds = before + time.monotonic() - start
        self.save()

    def rehearse(self) -> None:
        """One forward and backward pass that changes nothing."""
        self._gradients(Moment(0, 1, self._generator(0)))
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving averages are in the parameters' place inside the block."""
        held = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, held)

    def save(self) -> None:
        """Writes everything the next step depends on."""
        self.kept = self.step
        if not self.team.is_main:
            return
        state, plain = pack_state(self.optimizer)
        tensors = {f"parameter.{name}": p.detach() for name, p in self.named.items()}
        tensors |= {f"average.{name}": a for name, a in zip(self.named, self.averages, strict=True)}
        notes = {
            "step": self.step,
            "total": self.total,
            "seconds": self.seconds,
            "history": self.log.entries,
            "plain": plain,
        }
        self.workspace.save(self.stage, {**tensors, **state}, {"trainer": json.dumps(notes)})

    def save_if_sound(self) -> None:
        """Writes it unless the loss has run away: what was written before is the better place to go on from."""
        if not self.log.has_exploded:
            self.save()

    def _restore(self) -> float:
        if not self.workspace.has(self.stage):
            return 0.0
        tensors, notes = self.workspace.load(self.stage), json.loads(self.workspace.notes(self.stage)["trainer"])
        with torch.no_grad():
            for (name, parameter), average in zip(self.named.items(), self.averages, strict=True):
                parameter.copy_(tensors[f"parameter.{name}"])
                average.copy_(tensors[f"average.{name}"])
        unpack_state(self.optimizer, tensors, notes["plain"])
        self.step, self.total, self.log.entries = notes["step"], notes["total"], notes["history"]
        self.kept = self.step
        return float(notes["seconds"])

    def _steps(self) -> int:
        """The number of steps of this run; a budget in seconds is measured out on a few that change nothing."""
        duration = self.settings.duration
        if duration.steps is not None:
            return duration.steps
        assert duration.seconds is not None
        start = time.monotonic()
        self.rehearse()
        self._wait()
        began, timed = time.monotonic(), 0
        while (timed < _TIMED and time.monotonic() - start < 0.1 * duration.seconds) or not timed:
            self.rehearse()
            self._wait()
            timed += 1
        each = 1.1 * (time.monotonic() - began) / timed  # the optimiser takes a part as well
        left = duration.seconds - self.spent - (time.monotonic() - start)
        total = torch.tensor(max(10, round(left / each)), device=self.stream.device)
        if self.team.world > 1:
            torch.distributed.broadcast(total, 0)
        return int(total)

    def _train(self) -> dict[str, Tensor]:
        moment = Moment(self.step, self.total, self._generator(self.step))
        for group, own in zip(self.groups, self.optimizer.param_groups, strict=True):
            own["lr"] = group.lr * self._factor(self.step)
        parts = self._gradients(moment)
        self.team.average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        if not math.isfinite(norm.item()):
            self._stop(moment)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - self._decay())
        return {**parts, "norm": norm}

    def _gradients(self, moment: Moment) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.stream.batch(self.stage, moment.step)
        total: dict[str, Tensor] = {}
        for part, share in batch.split(self.settings.micro):
            with autocast(self.stream.device):
                losses = self.loss(part, moment)
            (losses["loss"] * share * self.stream.share).backward()
            for name, value in losses.items():
                total[name] = total.get(name, 0) + value.detach() * share
        return total

    def _factor(self, step: int) -> float:
        warmup = max(1, min(self.settings.warmup, self.total // 10))
        floor = self.settings.floor
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / self.total))
        return min(1.0, (step + 1) / warmup) * cosine

    def _decay(self) -> float:
        long = 1 - 20 / self.total if self.settings.ema is None else self.settings.ema
        return min(max(0.0, long), self.step / (self.step + 10))  # the start is forgotten sooner

    def _generator(self, step: int) -> torch.Generator:
        return step_generator(self.stream.seed, "gates", step * self.team.world + self.team.rank, self.stream.device)

    def _stop(self, moment: Moment) -> None:
        self.save_if_sound()

        def again() -> None:
            self._gradients(moment)

        with torch.compiler.set_stance("force_eager"):
            where = first_nonfinite(self.models, self.named, again)
        kept = f"the state after step {self.kept}, kept in {self.workspace.folder}" if self.kept else "its start"
        raise Diverged(
            f"{self.stage} stopped at step {moment.step + 1} of {self.total}: {where}. Run again with --resume and a "
            f"lower --lr, which goes on from {kept}, or look at the data and begin anew"
        )

    def _is_due(self, saved: float) -> bool:
        if self.settings.save_steps is not None:
            return self.step % self.settings.save_steps == 0
        return time.monotonic() - saved > self.settings.save

    def _wait(self) -> None:
        if self.stream.device.type == "cuda":
            torch.cuda.synchronize(self.stream.device)


def autocast(device: torch.device) -> Any:
    """bfloat16 where the parameters are float32, on an accelerator; on a CPU everything stays float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu")
