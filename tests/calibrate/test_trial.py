"""Of several plans the one that samples best is taken."""

from pathlib import Path

import pytest
import torch
from torch import nn

from vdit_quant.calibrate.plan import LayerPlan
from vdit_quant.calibrate.progress import Progress
from vdit_quant.calibrate.trial import choose, plans_of, trial_samples, try_plans
from vdit_quant.evaluate.sampling import Workload, make_sampler
from vdit_quant.quantize.allocate import Budget, Candidate, LayerCandidates
from vdit_quant.quantize.bit_plan import BitPlan
from vdit_quant.quantize.format import Tensors
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.attach import linear_layers
from vdit_quant.runtime.source import find_source


def test_the_plan_that_samples_best_is_taken_and_common_layers_are_compressed_once(tiny_folder: Path) -> None:
    sampler = make_sampler(find_source(tiny_folder), torch.float32, "cpu")
    weights = {name: m.weight.detach() for name, m in linear_layers(sampler.denoiser).items() if "ff.net" in name}
    layers = [LayerPlan(name, "feed_forward", *w.shape, None, None, "") for name, w in weights.items()]
    first, *rest = weights
    plans = [
        BitPlan({first: low, **dict.fromkeys(rest, "w8")}, "4bits", 0, 4.0, 0.0) for low in ("w2g64", "w8", "w3g64")
    ]
    made: list[tuple[str, str]] = []

    def compress(layer: LayerPlan, spec: LayerSpec) -> Tensors:
        made.append((layer.name, spec.name))
        return spec.weight.resolve().encode(weights[layer.name], spec.weight)

    work = Workload(samples=2, steps=2)
    best, scores = try_plans(sampler, work, plans, layers, compress, Progress())
    assert best is plans[1]
    assert scores[1] > scores[2] > scores[0]
    assert len(made) == len(set(made)) == len(weights) + 2
    assert all(type(m) is nn.Linear for m in linear_layers(sampler.denoiser).values())
    alone, none = try_plans(sampler, work, plans[:1], layers, lambda *_: pytest.fail("tried"), Progress())
    assert alone is plans[0]
    assert none == []


def test_there_are_several_plans_only_where_effects_make_a_difference() -> None:
    draw = torch.Generator().manual_seed(0)
    shared, rows = torch.randn(32, generator=draw), []
    for number in range(12):
        sign = 2 if number % 4 else -4
        made = [
            Candidate(spec, 128 * bits, 0.0, effect=2.0**-bits * (sign * shared + torch.randn(32, generator=draw)))
            for spec, bits in (("w2g64", 2), ("w4g64", 4), ("w8", 8))
        ]
        candidates = tuple(
            Candidate(c.spec, c.bytes, float(c.effect.square().sum()), effect=c.effect)
            for c in made
            if c.effect is not None
        )
        rows.append(LayerCandidates(f"layer.{number}", 1024, candidates))
    plans = plans_of(rows, Budget.parse("4bits"))
    assert plans[0].solver == "milp"
    assert len(plans) > 1
    assert all(plan.bits <= 4 for plan in plans)
    assert len(plans_of(rows, Budget.parse("8bits"))) == 1, "everything at 8 bits"
    assert trial_samples(torch.device("cpu")) > 8, "more than what the sensitivities were measured on"


def test_a_plan_is_preferred_to_the_one_before_where_samples_tell_them_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    common, noise = 40 + 3 * torch.randn(64, generator=draw), torch.randn(2, 64, generator=draw)
    noise -= noise.mean(1, keepdim=True)  # the means are then those below
    first, little, much = common, common + 0.05 + noise[0], common + 0.4 + noise[1]
    assert choose([first, little]) == 0, "0.05 dB, of which the standard error is an eighth"
    assert choose([first, little, much]) == 2
    assert choose([much, first, little]) == 0
    assert choose([first]) == 0
