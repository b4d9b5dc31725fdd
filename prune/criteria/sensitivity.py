"""Leave one out: how much the diffusion loss of the model rises when a block alone is skipped, same batches for all."""

from __future__ import annotations

import torch

from ..criterion import ScoreCriterion, Study
from ..masking import Gates


class Sensitivity(ScoreCriterion):
    def scores(self, study: Study) -> dict[str, float]:
        rise = dict.fromkeys(study.blocks, 0.0)
        study.progress.stage("leaving out one block at a time", study.measured)
        skipped = torch.zeros((), device=study.stream.device)
        with Gates(study.model, study.blocks) as gates:
            for number, batch in enumerate(study.batches()):
                whole = batch.error(batch.predict(study.model)).double()
                for name in study.blocks:
                    with gates.using({name: skipped}):
                        without = batch.error(batch.predict(study.model)).double()
                    rise[name] += float(without - whole) / study.measured
                study.progress.advance(number + 1)
        return rise


CRITERION = Sensitivity()
