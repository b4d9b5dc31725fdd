"""What a depth-pruned model is made of: which blocks of each stack are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..quantize.errors import InputError, unknown
from ..runtime.family import Family


@dataclass(frozen=True)
class Stack:
    """A list of interchangeable blocks of a model: `name` in the model, `depth_key` in its config.

    pinned  indices of blocks that cannot be taken out
    """

    name: str
    depth_key: str
    depth: int
    pinned: tuple[int, ...] = ()

    def block(self, index: int) -> str:
        return f"{self.name}.{index}"


@dataclass(frozen=True)
class StackPlan:
    """The blocks of one stack that stay, ascending. `scores`: one a block, higher is more worth keeping, where the
    criterion gives any."""

    name: str
    depth_key: str
    depth: int
    kept: tuple[int, ...]
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        kept = self.kept
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.depth:
            raise InputError(f"{self.name}: expected ascending block numbers below {self.depth}, found {list(kept)}")
        if self.scores and len(self.scores) != self.depth:
            raise InputError(f"{self.name}: expected {self.depth} scores, found {len(self.scores)}")

    @property
    def removed(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.depth) if i not in self.kept)

    def layer_map(self) -> tuple[int, ...]:
        """For each kept block the block of the original whose output it answers for: the last one before the next kept
        block, so that a block also stands for those removed behind it. Every other block of 28 kept: 1, 3, ..., 27."""
        return (*(following - 1 for following in self.kept[1:]), self.depth - 1)


@dataclass(frozen=True)
class PrunePlan:
    """Which blocks stay in each stack, by which criterion; JSON through `to_dict` and `from_dict`."""

    stacks: tuple[StackPlan, ...]
    criterion: str = ""
    notes: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def depths(self) -> dict[str, int]:
        """Config name of a depth -> blocks that stay."""
        return {stack.depth_key: len(stack.kept) for stack in self.stacks}

    def kept_blocks(self) -> dict[str, str]:
        """Block name in the pruned model -> block name in the original."""
        return {
            f"{stack.name}.{new}": f"{stack.name}.{old}" for stack in self.stacks for new, old in enumerate(stack.kept)
        }

    def feature_pairs(self) -> dict[str, str]:
        """Block name in the pruned model -> block name in the original whose output it should give."""
        return {
            f"{stack.name}.{new}": f"{stack.name}.{old}"
            for stack in self.stacks
            for new, old in enumerate(stack.layer_map())
        }

    def to_dict(self) -> dict[str, Any]:
        stacks = [
            {
                "name": s.name,
                "depth_key": s.depth_key,
                "depth": s.depth,
                "kept": list(s.kept),
                **({"scores": list(s.scores)} if s.scores else {}),
            }
            for s in self.stacks
        ]
        return {"criterion": self.criterion, "stacks": stacks, "notes": self.notes}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "prune plan") -> PrunePlan:
        """Raises InputError for anything but what `to_dict` gives."""
        _known(data, ("criterion", "stacks", "notes"), where)
        try:
            stacks = []
            for entry in data["stacks"]:
                _known(entry, ("name", "depth_key", "depth", "kept", "scores"), where)
                depth = _whole(entry["depth"], "depth", where)
                kept = tuple(_whole(i, "kept", where) for i in entry["kept"])
                names = (str(entry["name"]), str(entry["depth_key"]))
                stacks.append(StackPlan(*names, depth, kept, tuple(entry.get("scores", ()))))
            return cls(tuple(stacks), str(data.get("criterion", "")), dict(data.get("notes", {})))
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: not a prune plan ({type(error).__name__}: {error})") from None

    def check(self, stacks: Sequence[Stack], where: str = "prune plan") -> None:
        """Raises InputError unless the plan, which is from `where`, is for a model with these stacks."""
        ours, theirs = ([(s.name, s.depth_key, s.depth) for s in found] for found in (self.stacks, stacks))
        if ours != theirs:
            raise InputError(f"{where}: the plan is for a model of {_words(ours)}, this one has {_words(theirs)}")
        for plan, stack in zip(self.stacks, stacks, strict=True):
            lost = sorted(set(stack.pinned) & set(plan.removed))
            if lost:
                name = stack.block(lost[0])
                raise InputError(f"{where}: {name} cannot be taken out: the rest of the model reads from it")


def find_stacks(model: nn.Module, family: Family) -> tuple[Stack, ...]:
    """The stacks of blocks that can be made shorter; on a model without weights none of their blocks are pinned.

    Raises InputError, saying why, for a model without any.
    """
    kind = type(model).__name__
    if not family.depths:
        raise InputError(f"{kind}: {refusal(family)}")
    is_empty = any(p.is_meta for p in model.parameters())
    pinned = () if is_empty else family.pinned_blocks(model)
    found = []
    for name, key in zip(family.block_lists(model), family.depths, strict=True):
        blocks = list(model.get_submodule(name).children())
        shapes = [{n: tuple(t.shape) for n, t in block.state_dict().items()} for block in blocks]
        odd = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
        if odd is not None:
            raise InputError(
                f"{kind}: blocks cannot be taken out of {name}: {name}.{odd} differs from {name}.0 in shape"
            )
        found.append(Stack(name, key, len(blocks), tuple(i for i in range(len(blocks)) if f"{name}.{i}" in pinned)))
    return tuple(stack for stack in found if stack.depth)


def refusal(family: Family) -> str:
    """Why a family without depths is not pruned."""
    if family.name == "generic":
        return "depth pruning needs a family file that names the config value of the depth; this model has no file"
    return f"blocks of the family '{family.name}' are not interchangeable, so none can be taken out"


def parse_keep(text: str, stacks: Sequence[Stack]) -> tuple[int, ...]:
    """Blocks to keep in each stack: "6" for a model of one stack, "10,20" in the stacks' order, or
    "transformer_blocks=10" with every stack that is not named kept whole. Raises InputError for anything else."""
    names = [stack.name for stack in stacks]
    parts = [part.strip() for part in text.split(",")]
    if any("=" in part for part in parts):
        given = dict(part.partition("=")[::2] for part in parts)
        for name in given:
            if name not in names:
                raise unknown("stack", name, names, "--keep")
        parts = [given.get(stack.name, str(stack.depth)) for stack in stacks]
    if len(parts) != len(stacks):
        known = ", ".join(f"{stack.name} ({stack.depth})" for stack in stacks)
        raise InputError(f"--keep '{text}': expected {len(stacks)} numbers, one for each of {known}")
    keep = []
    for part, stack in zip(parts, stacks, strict=True):
        least = max(1, len(stack.pinned))
        if not part.isdecimal() or not least <= int(part) <= stack.depth:
            raise InputError(f"--keep '{text}': {stack.name}: expected {least} to {stack.depth} blocks, found '{part}'")
        keep.append(int(part))
    if keep == [stack.depth for stack in stacks]:
        raise InputError(f"--keep '{text}': that is every block; nothing would be taken out")
    return tuple(keep)


def _known(data: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected an object, found {type(data).__name__}")
    for key in data:
        if key not in keys:
            raise unknown("key", str(key), keys, where)


def _whole(value: Any, key: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where}: {key}: expected a whole number, found {value!r}")
    return value


def _words(stacks: list[tuple[str, str, int]]) -> str:
    return ", ".join(f"{depth} {name} ({key})" for name, key, depth in stacks) or "no stack"
