"""Block influence (ShortGPT, Men et al. 2024, arXiv 2403.03853): `1 - mean cos(x_i, x_i+1)` over tokens, x_i being what
goes into block i. A block that hardly turns its input is taken to be dispensable."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..criterion import ScoreCriterion, Study
from ..masking import Inputs


class BlockInfluence(ScoreCriterion):
    def scores(self, study: Study) -> dict[str, float]:
        total = dict.fromkeys(study.blocks, 0.0)
        turned = dict.fromkeys(study.blocks, 0.0)  # in one batch

        def see(name: str, before: Tensor, after: Tensor) -> None:
            cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
            turned[name] = float(1 - cosine.double().mean())

        with Inputs(study.model, study.blocks, see):
            for batch, share in study.batches():
                batch.predict(study.model)
                total = {name: value + share * turned[name] for name, value in total.items()}
        return total


CRITERION = BlockInfluence()
