"""Text prompts to sample with: those that ship with the package, or a file of the user's."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from ..quantize.errors import InputError
from .conditions import condition_order


def pick_prompts(path: str | None, count: int, seed: int) -> list[str]:
    """`count` prompts of a file with one on each line, or of those that ship, in an order drawn from `seed`; each is
    used once before any is used again.

    Raises InputError as `read_prompts` does.
    """
    if path is None:
        prompts = _lines((resources.files(__package__) / "prompts.txt").read_text(encoding="utf-8"))
    else:
        prompts = read_prompts(path)
    return [prompts[i] for i in condition_order(len(prompts), count, seed).tolist()]


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file that are not empty. Raises InputError for another file, and for none."""
    try:
        prompts = _lines(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: prompts cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected prompts as UTF-8 text, one on each line") from None
    if not prompts:
        raise InputError(f"{path}: no prompts; expected one on each line")
    return prompts


def prompts_fingerprint(path: str | Path) -> str:
    """A name for what the file asks for."""
    return hashlib.sha256("\n".join(read_prompts(path)).encode()).hexdigest()[:16]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
