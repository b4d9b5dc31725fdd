"""Text prompts to sample with: those that ship with the package, or a file of the user's."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from ..quantize.errors import InputError
from .conditions import condition_order


def pick_prompts(path: str | None, count: int, seed: int, learn: bool = False) -> list[str]:
    """`count` prompts of a file with one on each line, or of those that ship, in an order drawn from `seed`; each is
    used once before any is used again. learn: for samples that a method learns from; of those that ship, a comparison
    has others.

    Raises InputError as `read_prompts` does.
    """
    prompts = shipped_prompts(learn) if path is None else read_prompts(path)
    return [prompts[i] for i in condition_order(len(prompts), count, seed).tolist()]


def shipped_prompts(learn: bool) -> list[str]:
    """Prompts that ship with the package, to learn from or to compare by."""
    name = "prompts_calibrate.txt" if learn else "prompts_compare.txt"
    return _lines((resources.files(__package__) / name).read_text(encoding="utf-8"))


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file that are not empty. Raises InputError for another file, and for none."""
    try:
        prompts = _lines(Path(path).read_text(encoding="utf-8-sig"))  # editors may put a mark in front
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
