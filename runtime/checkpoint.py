"""Reading safetensors checkpoints, one file or sharded, with one clear error for each way they can be broken."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..quantize.errors import InputError, unknown

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_END = 1 << 20


def file_traits(path: Path) -> bytes:
    """What tells a large file apart from others in no time: its name, size, start and end. Raises OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_END)
        file.seek(max(0, size - _END))
        return f"{path.name}:{size}".encode() + start + file.read(_END)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError when it is missing, unreadable or not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:  # nested without end
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def inside(folder: Path, name: str) -> Path:
    """`folder / name`. Raises InputError when that leads out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{folder}: the file name '{name}' leads out of the folder")
    return folder / name


@dataclass(frozen=True)
class Checkpoint:
    """The tensors in a folder: names, shapes and dtypes from the headers; data only when asked for. `weights` is the
    name of the file that holds them all; shards have an index beside them that is named after it."""

    folder: Path
    weights: str = WEIGHTS

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> file. Raises InputError for a missing or broken index, or a missing shard."""
        index = self.folder / f"{self.weights}.index.json"
        if not index.exists():
            path = self.folder / self.weights
            if not path.exists():
                raise InputError(f"{self.folder}: no {path.name} and no {index.name}{self._others()}")
            return dict.fromkeys(read_header(path), path)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: expected a 'weight_map' object")
        found = {}
        for name, file in weight_map.items():
            path = inside(self.folder, str(file))
            if not path.exists():
                raise InputError(f"{index} names the shard {file}, which is missing (it holds {name}, among others)")
            found[name] = path
        for path in sorted(set(found.values())):
            held = set(read_header(path))
            for name, file in found.items():
                if file == path and name not in held:
                    raise InputError(f"{path}: the index says it holds {name}, which it does not")
        return found

    def _others(self) -> str:
        """What lies in the folder in the place of the weights, for a message."""
        stem, ending = self.weights.rsplit(".", 1)
        variants = sorted(path.name for path in self.folder.glob(f"{stem}.*.{ending}*"))
        if not variants:
            return ""
        return f"; it holds {variants[0]}, a variant, and those are not read: save the model again without one"

    @cached_property
    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor name -> (shape, safetensors dtype such as BF16)."""
        out: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in sorted(set(self.files.values())):
            out.update(read_header(path))
        return {name: out[name] for name in self.files}

    def get(self, name: str) -> Tensor:
        if name not in self.files:
            raise unknown("tensor", name, self.files, str(self.folder))
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name -> (shape, safetensors dtype such as BF16) of one file. Raises InputError when it is none."""
    if path.is_dir():
        raise InputError(f"{path}: a folder, expected a safetensors file")
    try:
        path.open("rb").close()  # safetensors takes whatever it cannot open for a missing file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a complete safetensors file ({path.stat().st_size:,} bytes on disk): {error}. "
            "Truncated download, or another kind of file under that name?"
        ) from None


def refuse_pickle(path: Path) -> None:
    """Raises InputError for a file that its name says is a pickle."""
    if path.suffix in PICKLES:
        raise InputError(
            f"{path}: a pickle, which can run code when it is read, so it is not; expected safetensors. Convert it "
            "once, where that does no harm: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"
        )
