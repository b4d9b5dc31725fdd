"""The samples of a comparison in parts, in files where there is room: those of a few videos are more than memory."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..quantize.errors import reason_of
from .sampling import Samples, join_samples

logger = logging.getLogger("vdit_quant")
PART_BYTES = 256_000_000  # metrics in float64 take some eight times as much
SPARE_BYTES = 1_000_000_000  # left to whoever else writes to the disk


@dataclass(frozen=True)
class SeedSamples:
    """What one model sampled from one seed.

    parts       its samples in order, each part in memory or in a safetensors file
    conditions  a name for what was asked for
    guidance    the scale it was sampled with; None: the sampler knows none
    """

    parts: tuple[Samples | Path, ...]
    conditions: str
    guidance: float | None

    def __iter__(self) -> Iterator[Samples]:
        """The parts, each of which is read when its turn comes; without conditions."""
        return (part if isinstance(part, Samples) else _read(part) for part in self.parts)

    def first_images(self, count: int) -> Tensor:
        """float32 [count, ...], or less where there are less."""
        found: list[Tensor] = []
        for part in self:
            found.append(part.images[:count])
            count -= len(found[-1])
            if not count:
                break
        return torch.cat(found)


@contextmanager
def part_folder(output: Path | None) -> Iterator[Path | None]:
    """A temporary folder for parts, gone after the block; None where none can be made, which is logged.

    output  a file that will be written, beside which there is room for large ones; None: where temporary files go
    """
    try:
        parent = None if output is None else output.parent
        folder = tempfile.TemporaryDirectory(prefix=".samples-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        logger.warning("samples are held in memory: no temporary folder can be made (%s)", reason_of(error))
        yield None
        return
    with folder as name:
        yield Path(name)


def keep_parts(batches: Iterable[Samples], folder: Path | None) -> tuple[Samples | Path, ...]:
    """Batches as parts of `PART_BYTES` or up to a batch more, of which one at a time is in memory: they go to files in
    `folder`. Without one they stay in memory, as they do from where the disk has no room, which is logged."""
    parts: list[Samples | Path] = []
    for samples in _joined(batches):
        part = samples if folder is None else _write(samples, folder)
        if part is samples:
            folder = None
        parts.append(part)
        del samples, part  # before the next ones are sampled
    return tuple(parts)


def _joined(batches: Iterable[Samples]) -> Iterator[Samples]:
    waiting: list[Samples] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(_size, waiting)) >= PART_BYTES:
            yield join_samples(waiting)
            waiting = []
    if waiting:
        yield join_samples(waiting)


def _size(samples: Samples) -> int:
    return sum(tensor.nbytes for tensor in (samples.images, *samples.trajectory))


def _write(samples: Samples, folder: Path) -> Path | Samples:
    """The file that the samples are in now, or where that fails themselves."""
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    tensors = {f"step.{number}": latents for number, latents in enumerate(samples.trajectory)}
    try:
        free = shutil.disk_usage(folder).free
        if free < _size(samples) + SPARE_BYTES:
            raise OSError(f"{free / 1e9:.1f} GB free")
        save_file({"images": samples.images, **tensors}, path)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        logger.warning("samples are held in memory, there is no room in %s (%s)", folder.parent, reason_of(error))
        return samples
    return path


def _read(path: Path) -> Samples:
    tensors = load_file(path)
    images = tensors.pop("images")
    return Samples(images, [tensors[f"step.{number}"] for number in range(len(tensors))])
