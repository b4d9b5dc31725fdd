"""The processes that train together: one, unless `accelerate launch` or `torchrun` started several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """rank of world processes; `state` is accelerate's, None for one process."""

    rank: int = 0
    world: int = 1
    state: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces every gradient by its mean over the processes, in one exchange for each dtype."""
        if self.world == 1:
            return
        from torch.distributed import all_reduce

        grads = [p.grad for p in parameters if p.grad is not None]
        for dtype in {g.dtype for g in grads}:
            same = [g for g in grads if g.dtype == dtype]
            flat = torch.cat([g.flatten() for g in same])
            all_reduce(flat)
            parts = (flat / self.world).split([g.numel() for g in same])
            torch._foreach_copy_(same, [part.view_as(g) for part, g in zip(parts, same, strict=True)])


def find_team(device: torch.device) -> tuple[Team, torch.device]:
    """The team this process is in, and its own device."""
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes == 1:
        return Team(), device
    return Team(state.process_index, state.num_processes, state), state.device
