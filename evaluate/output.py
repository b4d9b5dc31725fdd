"""Files that a result is saved to: looked at before the long part, and whole or absent after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..quantize.errors import OutputError, reason_of
from ..runtime.writer import try_folder


def check_writable(path: Path) -> None:
    """Makes the folder of `path`. Raises OutputError when no file of that name can be written there."""
    if path.is_dir():
        raise OutputError(f"{path}: expected a file or nothing there, found a folder")
    if file := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
        raise OutputError(f"{file}: expected a folder or nothing there, found a file")
    try:
        try_folder(path.parent)
    except OSError as error:
        raise _unwritten(path, error) from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A name to write to, whose file becomes `path` once it is whole."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def _unwritten(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: could not be written ({reason_of(error)})")
