"""What the toolkit knows about one kind of model: which layers there are, what each is for, how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize import registry
from . import families
from .attach import linear_layers


@dataclass(frozen=True)
class Family:
    """A model family. A new one is one file in `families/` that exports `FAMILY`.

    classes  names of the model classes it serves (base classes count)
    blocks   attribute names of the ModuleLists that hold the repeated blocks
    roles    (glob on the full layer name, role) in order, the first match decides; roles are listed in
             `quantize.recipe.ROLES`. A linear layer outside the blocks that nothing matches has the role "other".
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    roles: tuple[tuple[str, str], ...]

    def matches(self, model: nn.Module) -> bool:
        return any(base.__name__ in self.classes for base in type(model).__mro__)

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:
        return self.blocks

    def role(self, name: str, model: nn.Module) -> str:
        return next((role for pattern, role in self.roles if fnmatchcase(name, pattern)), "other")

    def linears(self, model: nn.Module) -> dict[str, str]:
        """Every linear layer's full name -> its role, in the model's order."""
        return {name: self.role(name, model) for name in linear_layers(model)}

    def block_names(self, model: nn.Module) -> list[str]:
        """Full names of the repeated blocks in order, such as transformer_blocks.0."""
        names = []
        for attribute in self.block_lists(model):
            blocks = model.get_submodule(attribute)
            names += [f"{attribute}.{i}" for i in range(len(list(blocks.children())))]
        return names

    def branches(self, kwargs: Mapping[str, Any], batch: int, repeat: int) -> Tensor:
        """int64 [batch]: the guidance branch of each batch row, 0 conditional, 1 unconditional.

        `kwargs` are the model's own call arguments; `repeat` counts earlier calls at this timestep, for pipelines that
        call the model once for each branch.
        """
        return torch.full((batch,), min(repeat, 1))

    def conditions(self, model: nn.Module, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` random but valid conditions as call arguments of the model, for running it without any data.

        Raises NotImplementedError when the family does not know how.
        """
        raise NotImplementedError

    def unconditional(self, model: nn.Module, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """The conditions of the unguided branch, of the same shapes."""
        raise NotImplementedError

    def latent_shape(self, model: nn.Module) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""
        raise NotImplementedError


def block_of(name: str, blocks: list[str]) -> str | None:
    """The block that the layer `name` lies in, or None."""
    return next((b for b in blocks if name.startswith(b + ".")), None)


def find_family(model: nn.Module) -> Family:
    """The family whose file serves this model; the generic one when none does."""
    package: ModuleType = families
    for name in registry.names(package):
        if name != "generic":
            family: Family = registry.find(package, name, "FAMILY")
            if family.matches(model):
                return family
    return registry.find(package, "generic", "FAMILY")
