"""Making a shallower model out of a model and a plan."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .plan import PrunePlan


def source_name(name: str, kept: dict[str, str]) -> str:
    """The tensor of the original that the pruned model's tensor `name` is taken from."""
    for new, old in kept.items():
        if name.startswith(new + "."):
            return old + name[len(new) :]
    return name


def build_student(teacher: Any, plan: PrunePlan) -> Any:
    """A copy of `teacher` with the plan's blocks, in eval mode: its own config with the new depths, its own weights."""
    student = copy.deepcopy(teacher)
    for stack in plan.stacks:
        owner, _, attribute = stack.name.rpartition(".")
        blocks = teacher.get_submodule(stack.name)
        kept = nn.ModuleList(copy.deepcopy(blocks[i]) for i in stack.kept)
        setattr(student.get_submodule(owner), attribute, kept)
    student.register_to_config(**plan.depths)
    return student.eval().requires_grad_(False)
