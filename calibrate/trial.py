"""Several bit plans of one budget tried on samples that none of them was made from."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluate.metrics import mean_psnr
from ..evaluate.sampling import Sampler, Workload
from ..quantize.allocate import Budget, LayerCandidates, allocate
from ..quantize.bit_plan import BitPlan
from ..quantize.format import Tensors
from ..runtime.attach import attach, detach
from .plan import LayerPlan
from .progress import Progress
from .sensitivity import Compress

TRUSTS = (0.0, 0.5, 1.0)


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
    """The plan whose samples are nearest to full precision, and the PSNR of every plan, in dB, over a range of 1.

    layers  the layers that the plans allocate; what two plans give the same spec is compressed once
    A single plan is returned untried.
    """
    if len(plans) == 1:
        return plans[0], []
    progress.stage("trying plans", len(plans))
    held: dict[tuple[str, str], Tensors] = {}
    scores: list[float] = []
    reference = sampler.run(workload).images
    for number, plan in enumerate(plans):
        progress.advance(number, f"plan {number + 1} of {len(plans)}, by {plan.solver}")
        for layer in layers:
            key = layer.name, plan.layers[layer.name]
            if key not in held:
                held[key] = compress(layer, plan.spec_of(layer.name))
        tensors = {name: held[name, spec] for name, spec in plan.layers.items()}
        originals = attach(sampler.denoiser, {name: plan.spec_of(name) for name in plan.layers}, tensors)
        try:
            scores.append(mean_psnr(sampler.run(workload).images, reference))
        finally:
            detach(sampler.denoiser, originals)
    best = max(range(len(plans)), key=scores.__getitem__)
    progress.note(f"plans tried on {workload.samples} samples: {', '.join(f'{s:.2f}' for s in scores)} dB")
    return plans[best], scores
