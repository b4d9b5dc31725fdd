"""Where an unfinished calibration keeps its work: a hidden folder beside the output, one file a finished part."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..quantize.errors import InputError, OutputError, reason_of

try:
    import fcntl
except ImportError:  # Windows: two runs that write one output are not told apart
    fcntl = None  # type: ignore[assignment]


class Workspace:
    """Finished parts of a run, each written under a temporary name and renamed, so a part is whole or absent."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f".{output.name}.partial"

    def open(self, job: dict[str, Any], resume: bool) -> str:
        """Prepares the folder for `job`; returns a line on what becomes of an interrupted run, "" where there is
        nothing to say.

        Raises InputError when asked to resume a run that had other settings, or while another run writes there.
        """
        self._claim()
        note = self.folder / "job.json"
        text = json.dumps(job, indent=1, sort_keys=True)
        if resume and note.exists():
            before = _read_note(note)
            changed = sorted(key for key in {*before, *job} if before.get(key) != json.loads(text).get(key))
            if changed:
                raise InputError(
                    f"--resume: the interrupted run of {self.output} had other settings ({', '.join(changed)}); "
                    "repeat them, or start anew without --resume"
                )
            return "resuming: finished parts of the interrupted run are used"
        line = f"--resume: no interrupted run of {self.output} is there; starting from the beginning" if resume else ""
        if count := self.count():
            same = note.exists() and note.read_text(encoding="utf-8", errors="replace") == text
            hint = "--resume would have gone on" if same else "they are of other settings"
            line = f"starting anew: {count} finished part(s) of an interrupted run are dropped; {hint}"
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{self.output}: no folder can be made there ({error})") from None
        self._claim()
        _replace(note, lambda path: path.write_text(text, encoding="utf-8"))
        return line

    def _claim(self) -> None:
        """Locks the folder, if there is one, for this process until it ends."""
        if fcntl is None or not self.folder.is_dir():
            return
        try:
            self._lock = (self.folder / "lock").open("w")
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.output}: another run is writing it; name another output, or wait for it") from None
        except OSError:  # a file system that knows no locks; what cannot be written is met below
            return

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A KeyboardInterrupt in the block says where finished parts are, if there are any."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if self.count():
                stop.args = (f"finished parts are in {self.folder}: the same command with --resume goes on",)
            raise

    def count(self) -> int:
        """How many parts are finished."""
        return sum(1 for _ in self.folder.rglob("*.safetensors"))

    def has(self, part: str) -> bool:
        return self._path(part).exists()

    def save(self, part: str, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
        # shared tensors are stored once for each name: safetensors refuses aliases
        plain = {name: t.clone() for name, t in tensors.items()}
        _replace(self._path(part), lambda path: save_file(plain, path, metadata=notes))

    def load(self, part: str) -> dict[str, Tensor]:
        """The tensors of `part`. Raises OutputError, as the two below do, when its file is damaged."""
        with readable(self._path(part)) as path:
            return load_file(path)

    def names(self, part: str) -> set[str]:
        """Names of the tensors of `part`."""
        with readable(self._path(part)) as path, safe_open(path, "pt") as file:
            return set(file.keys())

    def notes(self, part: str) -> dict[str, str]:
        """What was saved beside the tensors of `part`."""
        with readable(self._path(part)) as path, safe_open(path, "pt") as file:
            return dict(file.metadata() or {})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


@contextmanager
def readable(path: Path) -> Iterator[Path]:
    """OutputError for a file that is not whole: an InputError would take the other parts along."""
    try:
        yield path
    except (SafetensorError, OSError) as error:
        raise OutputError(
            f"{path}: expected a whole safetensors file of an earlier run ({reason_of(error)}); "
            "delete it, and a run with --resume makes it anew"
        ) from None


def _read_note(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = reason_of(error)
    if not isinstance(found, dict):
        raise InputError(f"--resume: {path}: expected the settings of an earlier run ({found}); start without --resume")
    return found


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
