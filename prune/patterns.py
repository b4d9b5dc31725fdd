"""N:M local groups: how a stack is cut into groups, and which patterns of kept blocks a group has to choose from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
from torch import Tensor

from ..quantize.errors import InputError
from .plan import Stack

_LARGEST = 4  # blocks of a group that is cut by itself: 1:2 beats 2:4 beats 7:14 in the paper, and C(4, 2) is small


@dataclass(frozen=True)
class BlockGroup:
    """`keep` of the `size` blocks of `stack` from `start` on stay."""

    stack: Stack
    start: int
    size: int
    keep: int

    @property
    def name(self) -> str:
        return f"{self.keep}:{self.size}"

    @property
    def blocks(self) -> range:
        return range(self.start, self.start + self.size)

    def options(self) -> Tensor:
        """float32 [patterns, size]: every choice of `keep` blocks that keeps the pinned ones, as zeros and ones."""
        pinned = {i - self.start for i in self.stack.pinned if i in self.blocks}
        chosen = [set(c) for c in combinations(range(self.size), self.keep) if pinned <= set(c)]
        return torch.tensor([[float(i in c) for i in range(self.size)] for c in chosen])


def cut(stack: Stack, keep: int, given: Sequence[str] = ()) -> list[BlockGroup]:
    """The groups of a stack: those of `given` ("N:M", one for each group or one for all), else as small as divides
    depth and `keep` alike, else groups of nearly equal size that share `keep` as evenly as sizes and pinned blocks let.

    Raises InputError when the given groups do not add up, or one has no pattern that keeps its pinned blocks.
    """
    pairs = _given(stack, keep, given) if given else _equal(stack, keep)
    groups, start = [], 0
    for count, size in pairs:
        groups.append(BlockGroup(stack, start, size, count))
        start += size
    for group in groups:
        if not len(group.options()):
            raise InputError(f"group {group.name} at {stack.block(group.start)}: more blocks are pinned than it keeps")
    return groups


def _equal(stack: Stack, keep: int) -> list[tuple[int, int]]:
    """(blocks kept, blocks) of groups of nearly equal size, of which each keeps its pinned blocks at least."""
    depth = stack.depth
    common = math.gcd(depth, keep)
    count = common if depth // common <= _LARGEST else -(-depth // _LARGEST)
    ends = [depth * i // count for i in range(count + 1)]
    sizes = [end - start for start, end in pairwise(ends)]
    least = [sum(start <= i < end for i in stack.pinned) for start, end in pairwise(ends)]
    even = [keep * (i + 1) // count - keep * i // count for i in range(count)]
    kept = [min(max(even[i], least[i]), sizes[i]) for i in range(count)]
    while (missing := keep - sum(kept)) != 0:
        step = 1 if missing > 0 else -1
        able = [i for i in range(count) if least[i] <= kept[i] + step <= sizes[i]]
        if not able:
            raise InputError(f"{stack.name}: {len(stack.pinned)} of its {depth} blocks are pinned, and {keep} are kept")
        # the group that is furthest from its even share, of those alike the first
        chosen = max(able, key=lambda i: step * (keep * sizes[i] - depth * kept[i]))
        kept[chosen] += step
    return list(zip(kept, sizes, strict=True))


def _given(stack: Stack, keep: int, texts: Sequence[str]) -> list[tuple[int, int]]:
    pairs = []
    for text in texts:
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if match is None or int(match[1]) > int(match[2]) or not int(match[2]):
            raise InputError(f"group '{text}': expected N:M, N blocks kept of M, such as 1:2")
        pairs.append((int(match[1]), int(match[2])))
    if len(pairs) == 1 and stack.depth % pairs[0][1] == 0:
        pairs *= stack.depth // pairs[0][1]
    kept, size = sum(n for n, _ in pairs), sum(m for _, m in pairs)
    if (kept, size) != (keep, stack.depth):
        raise InputError(
            f"groups {', '.join(texts)} keep {kept} of {size} blocks; "
            f"expected {keep} of the {stack.depth} of {stack.name}"
        )
    return pairs
