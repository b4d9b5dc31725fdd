"""Leave one out: how much the diffusion loss of the model rises when a block alone is skipped, same batches for all."""

from __future__ import annotations

import torch

from ..criterion import ScoreCriterion, Study
from ..masking import Gates


class Sensitivity(ScoreCriterion):
    def scores(self, study: Study) -> dict[str, float]:
        rise = dict.fromkeys(study.blocks, 0.0)
        study.progress.stage("leaving out one block at a time", 100)
        skipped = torch.zeros((), device=study.stream.device)
        with Gates(study.model, study.blocks) as gates:
            done = 0.0
            for batch, share in study.batches():
                whole = batch.error(batch.predict(study.model)).double()
                for name in study.blocks:
                    with gates.using({name: skipped}):
                        without = batch.error(batch.predict(study.model)).double()
                    rise[name] += float(without - whole) * share
                done += share
                study.progress.advance(round(100 * done))
        return rise


CRITERION = Sensitivity()
