"""Latents to train on: from safetensors shards, from a Python iterable, or sampled by the teacher itself.

A shard holds, for n samples,

    latents         float [n, ...]      as the denoiser's scheduler ends with them
    NAME            [n, ...]            every other call argument of the denoiser but the timestep: class_labels, ...
    uncond.NAME     [1, ...]            the same for the unguided branch; optional, in the first shard
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..evaluate.conditions import UNGUIDED, check_labels, check_names, check_shared, check_unguided
from ..quantize.errors import InputError
from ..runtime.checkpoint import file_traits
from ..runtime.family import Family

LATENTS = "latents"
_RESIDENT_BYTES = 16e9  # what may be kept on the accelerator


@dataclass(frozen=True)
class Latents:
    """parts: tensors of each shard, "latents" and call arguments, rows first; unguided: one row of each argument."""

    parts: tuple[dict[str, Tensor], ...]
    unguided: dict[str, Tensor]

    def __len__(self) -> int:
        return sum(len(part[LATENTS]) for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parts[0][LATENTS].shape[1:])

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(name for name in self.parts[0] if name != LATENTS)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """The rows `index` int64 [n] of every tensor, where the tensors lie."""
        if len(self.parts) == 1:
            return {name: tensor[index.to(tensor.device)] for name, tensor in self.parts[0].items()}
        ends = torch.tensor([len(part[LATENTS]) for part in self.parts]).cumsum(0)
        owners = torch.bucketize(index.cpu(), ends, right=True).tolist()
        starts = [0, *ends.tolist()]
        picked = [(self.parts[owner], row - starts[owner]) for owner, row in zip(owners, index.tolist(), strict=True)]
        return {name: torch.stack([part[name][row] for part, row in picked]) for name in self.parts[0]}

    def resident(self, device: torch.device) -> Latents:
        """The same as one part on `device`, where that is affordable."""
        size = sum(t.numel() * t.element_size() for part in self.parts for t in part.values())
        if size > _RESIDENT_BYTES:
            return self
        names = self.parts[0]
        joined = {name: torch.cat([part[name] for part in self.parts]).to(device) for name in names}
        return Latents((joined,), {name: t.to(device) for name, t in self.unguided.items()})

    def split(self, held_out: int) -> tuple[Latents, Latents]:
        """(all but `held_out` samples, those): one from each of as many equal stretches of the rows, so that data
        sorted by class holds out some of every class. Which one is random, as a fixed stride may hit a single class of
        repeating data, and always the same."""
        ends = torch.arange(held_out + 1) * len(self) // held_out
        generator = torch.Generator().manual_seed(0)
        index = ends[:-1] + (torch.rand(held_out, generator=generator) * ends.diff()).long()
        parts, start = [], 0
        for part in self.parts:
            stop = start + len(part[LATENTS])
            cuts = [row - start for row in index.tolist() if start <= row < stop]
            # views, because the shards may be larger than memory
            for first, last in zip([0, *(cut + 1 for cut in cuts)], [*cuts, stop - start], strict=True):
                if first < last:
                    parts.append({name: t[first:last] for name, t in part.items()})
            start = stop
        return Latents(tuple(parts), self.unguided), Latents((self.rows(index),), self.unguided)


def read_latents(folder: str | Path, model: nn.Module, family: Family) -> Latents:
    """The shards of a folder, in the order of their names; read from disk as they are used.

    Raises InputError, naming file and tensor, for whatever the model could not be trained on.
    """
    paths, parts = _shard_paths(folder), []
    for path in paths:
        try:
            parts.append(load_file(path))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: expected latents as safetensors ({error})") from None
    return _checked(parts, [str(path) for path in paths], model, family)


def fingerprint_shards(folder: str | Path) -> str:
    """A name for what the shards of a folder hold, from the names, sizes, starts and ends of the files: tells data
    apart in seconds, whatever its size. Raises InputError when there is no shard, or one cannot be read."""
    digest = hashlib.sha256()
    for path in _shard_paths(folder):
        try:
            digest.update(file_traits(path))
        except OSError as error:
            raise InputError(f"{path}: latents cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:16]


def _shard_paths(folder: str | Path) -> list[Path]:
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder}: expected a folder of safetensors shards with latents, found none")
    return paths


def collect_latents(data: Iterable[Mapping[str, Tensor]], model: nn.Module, family: Family) -> Latents:
    """The batches of an iterable: mappings with the tensors of a shard. Raises InputError as `read_latents` does."""
    parts = []
    for number, batch in enumerate(data):
        if not isinstance(batch, Mapping) or not all(isinstance(t, Tensor) for t in batch.values()):
            raise InputError(f"batch {number} of the data: expected a mapping of tensors, found {type(batch).__name__}")
        parts.append({name: t.detach().cpu() for name, t in batch.items()})
    if not parts:
        raise InputError("the data holds no batch")
    return _checked(parts, [f"batch {number} of the data" for number in range(len(parts))], model, family)


def _checked(parts: list[dict[str, Tensor]], places: list[str], model: nn.Module, family: Family) -> Latents:
    unguided: dict[str, Tensor] = {}
    rows = []
    for part, place in zip(parts, places, strict=True):
        free = {n.removeprefix(UNGUIDED): t for n, t in part.items() if n.startswith(UNGUIDED)}
        rows.append({name: t for name, t in part.items() if not name.startswith(UNGUIDED)})
        _check_rows(rows[-1], rows[0], place)
        guided = {name: t for name, t in rows[-1].items() if name != LATENTS}
        check_unguided(place, free, guided)
        check_labels(place, part, model)
        unguided.update({name: t[:1] for name, t in free.items()})
    _check_model(rows[0], places[0], model, family)
    if guided:
        check_names(places[0], guided, model, family)
    for part, place in zip(rows, places, strict=True):
        check_shared(place, part, rows[0], family)
    found = Latents(tuple(rows), unguided)
    return Latents(found.parts, unguided or _family_unguided(found, model, family))


def _check_rows(part: dict[str, Tensor], first: dict[str, Tensor], place: str) -> None:
    if LATENTS not in part:
        raise InputError(f"{place}: no tensor 'latents'; it holds {', '.join(sorted(part)) or 'nothing'}")
    latents = part[LATENTS]
    if not latents.is_floating_point() or latents.dim() < 2 or not len(latents):
        raise InputError(
            f"{place}: latents: expected floating point [n, ...], found {latents.dtype} {list(latents.shape)}"
        )
    if set(part) != set(first):
        raise InputError(
            f"{place}: expected {', '.join(sorted(first))} as in the first shard, found {', '.join(sorted(part))}"
        )
    for name, tensor in part.items():
        if tensor.shape[1:] != first[name].shape[1:]:
            raise InputError(f"{place}: {name} is {list(tensor.shape)}, in the first shard {list(first[name].shape)}")
        if len(tensor) != len(latents):
            raise InputError(f"{place}: {len(latents)} latents but {len(tensor)} {name}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0])
            raise InputError(f"{place}: {name}: sample {bad} holds NaN or infinity")


def _check_model(part: dict[str, Tensor], place: str, model: nn.Module, family: Family) -> None:
    for name, shape in family.condition_shapes(model).items():
        if name not in part:
            raise InputError(f"{place}: {type(model).__name__} needs '{name}', found {', '.join(sorted(part))}")
        found = tuple(part[name].shape[1:])
        if len(found) != len(shape) or any(want not in (None, got) for got, want in zip(found, shape, strict=True)):
            words = ", ".join("any" if s is None else str(s) for s in shape)
            raise InputError(
                f"{place}: {name}: expected [n{', ' + words if words else ''}], found {list(part[name].shape)}"
            )
    try:
        shape = family.latent_shape(model)
    except NotImplementedError:
        return
    if tuple(part[LATENTS].shape[1:]) != shape:
        raise InputError(
            f"{place}: latents: expected [n, {', '.join(map(str, shape))}], found {list(part[LATENTS].shape)}"
        )


def _family_unguided(latents: Latents, model: nn.Module, family: Family) -> dict[str, Tensor]:
    one: dict[str, Any] = {name: t[:1] for name, t in latents.parts[0].items() if name != LATENTS}
    try:
        return family.unconditional(model, one)
    except (NotImplementedError, KeyError):
        return {}
