"""Blocks spread evenly over the depth, first and last among them (BK-SDM, Kim et al. 2023, arXiv 2305.15798): the best
choice that looks at nothing, and close to the best there is where recovery is long."""

from __future__ import annotations

from ..criterion import Criterion, Study
from ..plan import PrunePlan, StackPlan


class Even(Criterion):
    needs_data = False

    def choose(self, study: Study, keep: tuple[int, ...]) -> PrunePlan:
        plans = []
        for stack, count in zip(study.stacks, keep, strict=True):
            step = (stack.depth - 1) / max(1, count - 1)
            kept = sorted(int(i * step + 0.5) for i in range(count))
            for pinned in stack.pinned:
                if pinned not in kept:
                    _, nearest = min((abs(i - pinned), i) for i in kept if i not in stack.pinned)
                    kept.remove(nearest)
                    kept.append(pinned)
            plans.append(StackPlan(stack.name, stack.depth_key, stack.depth, tuple(sorted(kept))))
        return PrunePlan(tuple(plans))


CRITERION = Even()
