"""Where an unfinished calibration keeps its work: a hidden folder beside the output, one file a finished part."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..quantize.errors import InputError, OutputError


class Workspace:
    """Finished parts of a run, each written under a temporary name and renamed, so a part is whole or absent."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f".{output.name}.partial"

    def open(self, job: dict[str, Any], resume: bool) -> bool:
        """Prepares the folder for `job`; returns whether earlier parts are there to be used.

        Raises InputError when asked to resume a run that had other settings.
        """
        note = self.folder / "job.json"
        text = json.dumps(job, indent=1, sort_keys=True)
        if resume and note.exists():
            before = json.loads(note.read_text(encoding="utf-8"))
            changed = sorted(key for key in {*before, *job} if before.get(key) != json.loads(text).get(key))
            if changed:
                raise InputError(
                    f"--resume: the interrupted run of {self.output} had other settings ({', '.join(changed)}); "
                    "repeat them, or start anew without --resume"
                )
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{self.output}: no folder can be made there ({error})") from None
        _replace(note, lambda path: path.write_text(text, encoding="utf-8"))
        return False

    def has(self, part: str) -> bool:
        return self._path(part).exists()

    def save(self, part: str, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
        # shared tensors are stored once for each name: safetensors refuses aliases
        plain = {name: t.clone() for name, t in tensors.items()}
        _replace(self._path(part), lambda path: save_file(plain, path, metadata=notes))

    def load(self, part: str) -> dict[str, Tensor]:
        return load_file(self._path(part))

    def names(self, part: str) -> set[str]:
        """Names of the tensors of `part`."""
        with safe_open(self._path(part), "pt") as file:
            return set(file.keys())

    def notes(self, part: str) -> dict[str, str]:
        """What was saved beside the tensors of `part`."""
        with safe_open(self._path(part), "pt") as file:
            return dict(file.metadata() or {})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # SafetensorError: how safetensors reports a full disk
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: could not be written ({error}); make room and run again with --resume, or remove {path.parent}"
        ) from error
