"""What the pruned model learns from: the data, the teacher's answers, and what the teacher's blocks hold on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .masking import Features
from .objective import Batch
from .trainer import Moment


@dataclass(frozen=True)
class Distillation:
    """`(1 - output) diffusion + output MSE(student, teacher) + beta features`, beta from `features` to 0 over the run
    (TinyFusion, Fang et al. 2024, arXiv 2412.01199).

    output    1.0 learns from the teacher alone: right where the data is the teacher's own; 0.0 is plain fine-tuning
    features  beta at the start; 0.0: no feature loss
    mask      sigmas beyond which an activation is left out of the feature loss; None: none is
    """

    output: float = 1.0
    features: float = 0.02
    mask: float | None = 2.0

    def mix(self, batch: Batch, out: Tensor, want: Tensor | None) -> dict[str, Tensor]:
        """The loss on the output and its parts, float32 scalars. `want`: the teacher's answer, None without it."""
        parts: dict[str, Tensor] = {}
        loss = torch.zeros((), device=out.device)
        if self.output < 1:
            parts["diffusion"] = batch.error(out)
            loss = loss + (1 - self.output) * parts["diffusion"]
        if want is not None:
            parts["output"] = F.mse_loss(out.float(), want.float())
            loss = loss + self.output * parts["output"]
        return {"loss": loss, **parts}


class Recovery:
    """The loss of a student beside its teacher. `pairs`: student block -> teacher block whose output it should give."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, pairs: Mapping[str, str], settings: Distillation
    ) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self.pairs = dict(pairs) if settings.features else {}
        self.ours = Features(student, tuple(self.pairs))
        self.theirs = Features(teacher, tuple(self.pairs.values()))

    def __enter__(self) -> Recovery:
        self.ours.__enter__()
        self.theirs.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.ours.__exit__(*error)
        self.theirs.__exit__(*error)

    def __call__(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        want = None
        if self.settings.output or self.pairs:
            want = ask(self.teacher, batch)
        out = batch.predict(self.student)
        parts = self.settings.mix(batch, out, want if self.settings.output else None)
        ours, theirs = self.ours.take(), self.theirs.take()
        if self.pairs:
            losses = [feature_loss(ours[s], theirs[t], self.settings.mask) for s, t in self.pairs.items()]
            parts["features"] = torch.stack(losses).mean()
            beta = self.settings.features * (1 - moment.fraction)
            parts["loss"] = parts["loss"] + beta * parts["features"]
        return parts


@torch.no_grad()
def ask(teacher: nn.Module, batch: Batch) -> Tensor:
    """The teacher's answer to a batch, in its own dtype."""
    with torch.autocast(batch.noised.device.type, enabled=False):
        return batch.predict(teacher)


def feature_loss(ours: Tensor, theirs: Tensor, mask: float | None) -> Tensor:
    """Squared error between two activations [n, ...] relative to the square of the second, sample by sample: the mean
    over the samples, float32 scalar.

    `mask` leaves out what lies further than so many standard deviations from its sample's mean, on either side: massive
    activations would be all that is learned. (TinyFusion zeroes each side by itself, which pulls the student to zero
    where only the teacher is masked.) Dividing by the square makes beta mean the same in every model.
    """
    s, t = ours.float(), theirs.float()
    if mask is not None:
        kept = within(s.detach(), mask) & within(t, mask)
        s, t = s * kept, t * kept
    dims = tuple(range(1, t.dim()))
    return ((s - t).square().mean(dims) / t.square().mean(dims).clamp_min(1e-12)).mean()


def within(h: Tensor, sigmas: float) -> Tensor:
    """bool, shape of `h` [n, ...]: less than `sigmas` standard deviations from the sample's mean."""
    dims = tuple(range(1, h.dim()))
    std, mean = torch.std_mean(h, dims, keepdim=True)
    return (h - mean).abs() < sigmas * std
