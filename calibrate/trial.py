"""Several bit plans of one budget tried on samples that none of them was made from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..evaluate.metrics import sample_psnr
from ..evaluate.sampling import Sampler
from ..evaluate.workload import Workload
from ..quantize.allocate import Budget, LayerCandidates, allocate
from ..quantize.bit_plan import BitPlan
from ..quantize.format import Tensors
from ..runtime.attach import attach_settled, detach
from .plan import LayerPlan
from .progress import Progress
from .sensitivity import Compress

TRUSTS = (0.0, 0.5, 1.0)


def trial_samples(device: torch.device) -> int:
    """Samples that plans are tried on: on a GPU they cost little."""
    return 16 if device.type == "cpu" else 64


def plans_of(table: Sequence[LayerCandidates], budget: Budget) -> list[BitPlan]:
    """The different plans that more and more trust in the products of effects gives, the plan of least sum first."""
    plans: list[BitPlan] = []
    for trust in TRUSTS:
        plan = allocate(table, budget, trust=trust)
        if all(plan.layers != other.layers for other in plans):
            plans.append(plan)
    return plans


def try_plans(
    sampler: Sampler,
    workload: Workload,
    plans: Sequence[BitPlan],
    layers: Sequence[LayerPlan],
    compress: Compress,
    progress: Progress,
) -> tuple[BitPlan, list[float]]:
    """The plan that `choose` takes, and the mean PSNR of every plan's samples, in dB, over a range of 1.

    layers  the layers that the plans allocate; what two plans give the same spec is compressed once
    A single plan is returned untried.
    """
    if len(plans) == 1:
        return plans[0], []
    progress.stage("trying plans", len(plans))
    held: dict[tuple[str, str], Tensors] = {}
    scores: list[Tensor] = []
    reference = sampler.run(workload).images
    for number, plan in enumerate(plans):
        progress.advance(number, f"plan {number + 1} of {len(plans)}, by {plan.solver}")
        for layer in layers:
            key = layer.name, plan.layers[layer.name]
            if key not in held:
                held[key] = compress(layer, plan.spec_of(layer.name))
        tensors = {name: held[name, spec] for name, spec in plan.layers.items()}
        originals = attach_settled(sampler.denoiser, {name: plan.spec_of(name) for name in plan.layers}, tensors)
        try:
            scores.append(sample_psnr(sampler.run(workload).images, reference))
        finally:
            detach(sampler.denoiser, originals)
    means = [float(score.mean()) for score in scores]
    progress.note(f"plans tried on {workload.samples} samples: {', '.join(f'{mean:.2f}' for mean in means)} dB")
    return plans[choose(scores)], means


def choose(scores: Sequence[Tensor]) -> int:
    """The number of the best plan, from the PSNR of every sample of each, [n] each: the first, unless one after it is
    better on the same samples by more than one standard error of the difference. A few samples hardly tell good plans
    apart, and what was measured on few trusts the products of effects too much."""
    best = 0
    for number in range(1, len(scores)):
        difference = scores[number] - scores[best]
        if difference.mean() > difference.std() / len(difference) ** 0.5:
            best = number
    return best
