"""Relative change: `|block(x) - x|^2 / |x|^2` over all tokens, the error of leaving the block out at the place where it
stands, in the way FLUX.1-lite chose its blocks. Unlike block influence it sees lengths as well as directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..criterion import ScoreCriterion, Study
from ..masking import Inputs


class RelativeError(ScoreCriterion):
    def scores(self, study: Study) -> dict[str, float]:
        total = dict.fromkeys(study.blocks, torch.zeros(2, dtype=torch.float64))

        def see(name: str, before: Tensor, after: Tensor) -> None:
            change, size = (after - before).double().square().sum(), before.double().square().sum()
            total[name] = total[name] + torch.stack([change, size]).cpu()

        with Inputs(study.model, study.blocks, see):
            for batch, _ in study.batches():
                batch.predict(study.model)
        return {name: float(change / size) for name, (change, size) in total.items()}


CRITERION = RelativeError()
