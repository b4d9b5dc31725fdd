"""From errors of the denoiser at single steps to the error of what is sampled, without sampling.

A layer's error at one step is not independent of its error at the next: what points the same way adds up over a run,
what does not cancels. So the errors e_t of one sample's trajectory are summed as the sampler would, then squared:

    error = mean over samples and elements of ( sum_t c_t (s e_t[cond] + (1 - s) e_t[uncond]) )^2

c_t is the share of the path that step t stands for. With eps-prediction and x^ = x / sqrt(abar), sigma = sqrt((1 -
abar) / abar), the sampler integrates dx^ = eps dsigma, and a displacement made at sigma far above the data's own
deviation (taken as 1) shrinks with sigma again: c_t = asinh(sigma_t) - asinh(sigma_next), the integral of
dsigma / sqrt(1 + sigma^2). With flow matching dx = v dsigma and c_t = sigma_t - sigma_next.

On the bundled demo model log(error) of 152 (layer, candidate) pairs correlates 0.94 with that of whole sampling runs,
0.90 for the plain output error; at equal bytes (24 samples, 3 budgets) plans made from the latter were 0 to 4 dB worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..quantize.errors import InputError

_ROUNDING = 1e-3  # a timestep's last digits differ between a scheduler and what its denoiser is called with


@dataclass(frozen=True)
class Drift:
    """weights: timestep -> c_t; guidance: the sampler's guidance scale s."""

    weights: Mapping[float, float]
    guidance: float = 1.0

    def error(self, difference: Tensor, timesteps: Tensor, branches: Tensor) -> float:
        """The squared length of the effect."""
        return float(self.effect(difference, timesteps, branches).square().sum())

    def effect(self, difference: Tensor, timesteps: Tensor, branches: Tensor) -> Tensor:
        """float64 [samples * elements]: what the sampler adds up, over the square root of its size.

        difference float [rows, ...] of the denoiser's outputs; timesteps float32 [rows]; branches int64 [rows], 0
        conditional, 1 unconditional; a timestep without rows of the second is one without guidance. The rows of one
        timestep and branch list the samples in one common order. Raises InputError when they are not as many.
        """
        total: Tensor | float = 0.0
        for step in timesteps.unique().tolist():
            here = timesteps == step
            found = branches[here].unique().tolist()
            for branch in found:
                rows = difference[(here & (branches == branch)).to(difference.device)].double()
                if isinstance(total, Tensor) and len(rows) != len(total):
                    raise InputError(
                        f"drift: the model was called for {len(rows)} samples at timestep {step:g} in branch {branch} "
                        f"and for {len(total)} elsewhere, expected as many; --sensitivity samples does without"
                    )
                share = self._share(branch, guided=len(found) > 1)
                total = total + rows * (share * self.weights[step])
        assert isinstance(total, Tensor)
        return total.flatten() / math.sqrt(total.numel())

    def _share(self, branch: int, guided: bool) -> float:
        if not guided:
            return 1.0
        return 1 - self.guidance if branch else self.guidance


def drift_of(scheduler: Any, timesteps: Iterable[float], guidance: float = 1.0, end: float | None = None) -> Drift:
    """The drift for a probe at `timesteps` of a diffusers scheduler (noise schedule or flow matching).

    end  the timestep at which the denoiser's part of the path ends, from `end_of`; None: it runs to the sample
    Raises InputError for a scheduler with neither `alphas_cumprod` nor flow-matching sigmas, or an unknown prediction.
    """
    steps = sorted({float(t) for t in timesteps}, reverse=True)
    config = getattr(scheduler, "config", {})
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None and not hasattr(scheduler, "sigmas"):
        raise InputError(f"{type(scheduler).__name__} has no noise schedule that is known here; use another score")
    flow = table is None or config.get("prediction_type") == "flow_prediction"
    train = config.get("num_train_timesteps", 1000)

    def place(step: float) -> float:
        """The integral of c up to this timestep."""
        return step / train if table is None or flow else math.asinh(_sigma(table, step))

    ends = [*(place(t) for t in steps[1:]), 0.0 if end is None else place(end)]
    kind = "flow" if flow else config.get("prediction_type", "epsilon")
    return Drift({t: (place(t) - end) * _gain(kind, table, t) for t, end in zip(steps, ends, strict=True)}, guidance)


def end_of(schedule: Iterable[float], last: float) -> float | None:
    """The timestep of a schedule that follows `last`, a denoiser's last one: where another denoiser goes on (that of
    low noise in Wan 2.2). None: there is none, and the denoiser runs to the sample."""
    return max((float(t) for t in schedule if t < last * (1 - _ROUNDING)), default=None)


def _sigma(table: Tensor, step: float) -> float:
    kept = float(table[min(max(int(step), 0), len(table) - 1)])
    return math.sqrt((1 - kept) / kept)


def _gain(kind: str, table: Tensor | None, step: float) -> float:
    """Error of eps for an error of 1 in what the model predicts."""
    if kind in ("flow", "epsilon"):
        return 1.0
    assert table is not None
    sigma = _sigma(table, step)
    if kind == "v_prediction":
        return 1 / math.sqrt(1 + sigma * sigma)
    if kind == "sample":
        return 1 / sigma
    raise InputError(f"prediction type '{kind}' is not known here; expected epsilon, v_prediction or sample")
