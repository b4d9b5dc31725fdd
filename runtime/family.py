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
class Fold:
    """Where the input scale of some layers can be folded into the layer that produces that input, at no run-time cost.

    The consumers all read `x`, and `x * s` is what they read after folding s [K] into the producer:

    producer   full name of a linear layer
    rows       the K output rows of the producer that carry x itself; they and their bias are multiplied by s
    plus_one   the K output rows that act as `(1 + row)` on x (adaLN's scale): weight * s, bias -> (bias + 1) * s - 1
    consumers  full names of every layer that reads x; their columns are divided by s
    """

    producer: str
    consumers: tuple[str, ...]
    rows: range
    plus_one: range | None = None


def modulation_fold(producer: str, consumers: tuple[str, ...], width: int, shift: int, scale: int) -> Fold:
    """The fold into an adaLN layer whose output is cut into parts of `width` rows; `shift` and `scale` number the two
    that act on what the consumers read: `norm(x) * (1 + scale) + shift`."""
    rows, ones = (range(part * width, (part + 1) * width) for part in (shift, scale))
    return Fold(producer, consumers, rows=rows, plus_one=ones)


def value_fold(attention: str, width: int) -> Fold:
    """The fold from an attention's output projection into its values: attention weights mix tokens, never channels.
    `width` is that of the values. Only exact where every value the projection reads comes from `to_v`."""
    return Fold(f"{attention}.to_v", (f"{attention}.to_out.0",), rows=range(width))


@dataclass(frozen=True)
class Family:
    """A model family. A new one is one file in `families/` that exports `FAMILY`.

    classes  names of the model classes it serves (base classes count)
    blocks   attribute names of the ModuleLists that hold the repeated blocks
    roles    (glob on the full layer name, role) in order, the first match decides; roles are listed in
             `quantize.recipe.ROLES`. A linear layer outside the blocks that nothing matches has the role "other".
    timestep_scale  what a scheduler's timestep is multiplied by before the model sees it
    depths   config names of the number of blocks, one for each of `blocks`; none: blocks cannot be taken out
    diffusion  whether the models predict the noise of a diffusion with linear betas, so that one without a scheduler
             can be sampled; False: those differ, or are flows
    shared   names of call arguments that the model takes once for a whole batch, such as tables of positions
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    roles: tuple[tuple[str, str], ...]
    timestep_scale: float = 1.0
    depths: tuple[str, ...] = ()
    diffusion: bool = True
    shared: tuple[str, ...] = ()

    def matches(self, model: nn.Module) -> bool:
        return any(base.__name__ in self.classes for base in type(model).__mro__)

    def sigmas(self, steps: int) -> list[float] | None:
        """Noise levels of a run of `steps` steps, where the family's pipeline names them; None: the scheduler's own."""
        return None

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

    def pinned_blocks(self, model: nn.Module) -> tuple[str, ...]:
        """Full names of blocks that the rest of the model reads from, so that they cannot be taken out."""
        return ()

    def folds(self, model: nn.Module) -> list[Fold]:
        """Every place where an input scale can be folded away; none unless the family knows its blocks."""
        return []

    def branches(self, kwargs: Mapping[str, Any], batch: int, repeat: int) -> Tensor:
        """int64 [batch]: the guidance branch of each batch row, 0 conditional, 1 unconditional.

        `kwargs` are the model's own call arguments; `repeat` counts earlier calls at this timestep. Pipelines call the
        model once for each branch, conditional first, or once with the same latents twice, unconditional first.
        """
        latents = main_input(kwargs)
        if latents is not None and _is_doubled(latents):
            return (torch.arange(batch) < batch // 2).long()
        return torch.full((batch,), min(repeat, 1))

    def for_batch(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditions [n, ...] each as the model is called with them: of those that are `shared` the first."""
        return {name: t[0] if name in self.shared else t for name, t in conditions.items()}

    def condition_shapes(self, model: nn.Module) -> dict[str, tuple[int | None, ...]]:
        """Call arguments that a run without a pipeline must give -> shape of one sample's, None: any size."""
        return {}

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


def main_input(call: Mapping[str, Any]) -> Tensor | None:
    """The first tensor of a denoiser's call arguments, which holds the latents; joined where they are a list of equal
    ones."""
    for value in call.values():
        if isinstance(value, Tensor):
            return value
        if isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
            return torch.stack(value) if len({v.shape for v in value}) == 1 else None
    return None


def _is_doubled(latents: Tensor) -> bool:
    half = len(latents) // 2 if latents.dim() else 0
    return half > 0 and len(latents) == 2 * half and torch.equal(latents[:half], latents[half:])


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
