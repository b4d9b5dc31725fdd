"""Writing an artifact: to a temporary name first, renamed when complete, so that a crash leaves nothing that loads."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..quantize.errors import InputError
from .artifact import is_artifact
from .checkpoint import INDEX, WEIGHTS
from .source import COMPONENTS, Source

_NOT_OF_NAMES = r"[^\w.,+-]+"
SHARD_BYTES = 5_000_000_000
# never copied from a source pipeline: weights in formats that can run code, and hub bookkeeping
_UNSAFE = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".py"}

Entry = tuple[tuple[int, ...], torch.dtype]


@contextmanager
def staged(output: Path, overwrite: bool = False, is_ours: Callable[[Path], bool] = is_artifact) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends well, and is removed when it does not.

    Raises InputError as `check_output` does, or when the disk cannot hold it.
    """
    check_output(output, overwrite, is_ours)
    temporary = output.parent / f".{output.name}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    except OSError as error:
        raise InputError(f"{output}: could not be written ({error}); nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def staged_around(
    source: Source | None, output: Path, overwrite: bool = False, is_ours: Callable[[Path], bool] = is_artifact
) -> Iterator[Path]:
    """As `staged`, but yields the folder of the denoiser, empty, with what belongs around it: the rest of the source's
    pipeline, or the scheduler that a bare transformer is sampled with."""
    with staged(output, overwrite, is_ours) as folder:
        inner = folder / source.component if source is not None and source.is_pipeline else folder
        inner.mkdir(exist_ok=True)
        if source is not None and source.is_pipeline:
            copy_pipeline(source.root, folder, skip=source.component)
        elif source is not None and source.scheduler is not None:
            copy_pipeline(source.scheduler, folder / "scheduler", skip="")
        yield inner


def check_output(output: Path, overwrite: bool, is_ours: Callable[[Path], bool] = is_artifact) -> None:
    """Raises InputError when something is at `output` that must not go: anything, or with `overwrite` anything that is
    not of the kind being written (a checkpoint, a folder of other files), or what cannot be renamed over. `is_ours`
    tells by a transformer folder."""
    if output.is_symlink():
        raise InputError(f"{output}: a link cannot be replaced; name the folder that it leads to, or another one")
    if not output.exists():
        return
    if output.is_mount() or Path.cwd().is_relative_to(output.resolve()):
        raise InputError(f"{output}: the current folder, or a mounted one, cannot be replaced; name a folder inside it")
    if not overwrite:
        raise InputError(f"{output} exists; name another output, or pass --overwrite")
    empty = output.is_dir() and not any(output.iterdir())
    if not empty and not any(map(is_ours, (output, *(output / name for name in COMPONENTS)))):
        kind = "is no artifact" if is_ours is is_artifact else "was not written by this command"
        raise InputError(f"{output} exists and {kind}, and --overwrite replaces nothing else; name another output")


def check_target(
    target: Path, source: Source | None, overwrite: bool, is_ours: Callable[[Path], bool] = is_artifact
) -> None:
    """As `check_output`; raises InputError also for an output inside the pipeline it is made from, which would hold it
    from then on: everything written later would get a copy."""
    check_output(target, overwrite, is_ours)
    if source is not None and source.is_pipeline:
        root = source.root.resolve()
        if target.resolve() == root:
            other = target.with_name(f"{target.name}-2")
            raise InputError(f"{target}: an output cannot replace the folder it is made from; name another: -o {other}")
        if target.resolve().is_relative_to(root):
            raise InputError(
                f"output {target} lies inside the model folder {root}, whose files an output gets copies of; "
                f"name one outside, such as -o {root.parent / target.name}"
            )


def preview_target(
    target: Path, source: Source | None, overwrite: bool, preview: bool, is_ours: Callable[[Path], bool] = is_artifact
) -> tuple[str, ...]:
    """`check_target`; in a preview, what it refuses is a note, and nothing is raised."""
    try:
        check_target(target, source, overwrite, is_ours)
    except InputError as error:
        if not preview:
            raise
        return (f"without --dry-run refused: {error}",)
    return ()


def try_folder(folder: Path) -> None:
    """Makes the folder and, for a moment, a file in it. Raises OSError where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def name_output(label: str, suffix: str) -> Path:
    """In the current folder, by the last part of a model's name; "." and ".." are the folders that they stand for. What
    a folder's name cannot be made of is left out of the suffix, which a recipe file may have chosen."""
    path = Path(label)
    name = path.resolve().name if path.name in ("", "..") else path.name
    return Path(f"{name}-{re.sub(_NOT_OF_NAMES, '-', suffix).strip('-.')}")


def write_tensors(folder: Path, entries: Mapping[str, Entry], get: Callable[[str], Tensor]) -> int:
    """Writes the tensors `entries` in order, fetched one shard at a time; returns their bytes."""
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, (shape, dtype) in entries.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if filled + size > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        _save(folder / WEIGHTS, shards[0], get)
        return total
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS.replace(".safetensors", f"-{number:05d}-of-{len(shards):05d}.safetensors")
        _save(folder / file, names, get)
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _save(path: Path, names: list[str], get: Callable[[str], Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in names:
        tensor = get(name).contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in storages else tensor  # tied weights: safetensors refuses aliases
        storages.add(place)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes for the user alone, whatever the umask


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_pipeline(source: Path, target: Path, skip: str = COMPONENTS[0]) -> None:
    """Copies a pipeline folder except its `skip` component: configs, tokenizers and safetensors, nothing executable."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if relative.parts[0] == skip or hidden or not path.is_file() or path.suffix in _UNSAFE:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
