"""Mean size of a block's weights: its matrices' mean absolute value. Small weights change little, the idea goes."""

from __future__ import annotations

from torch import nn

from ..criterion import ScoreCriterion, Study


class Magnitude(ScoreCriterion):
    needs_data = False

    def scores(self, study: Study) -> dict[str, float]:
        return {name: _mean_size(study.model.get_submodule(name)) for name in study.blocks}


def _mean_size(block: nn.Module) -> float:
    matrices = [layer.weight.detach().float() for layer in block.modules() if isinstance(layer, nn.Linear)]
    return float(sum(w.abs().sum() for w in matrices) / sum(w.numel() for w in matrices))


CRITERION = Magnitude()
