"""How large the samples of a pipeline are."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from ..quantize.errors import InputError

NAMES = {2: ("height", "width"), 3: ("num_frames", "height", "width")}


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """ "512x768" (height, width) or "33x480x832" (frames, height, width), in pixels; None stays None. Raises InputError
    for anything else."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in NAMES or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--size '{text}': expected HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH, as in 512x512 or 33x480x832")
    return tuple(int(part) for part in parts)


def show_size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def size_arguments(size: tuple[int, ...] | None, accepts: Container[str], pipeline: str) -> dict[str, Any]:
    """What a pipeline is called with for samples of a size; nothing for its own size. Raises InputError where it does
    not take one like that."""
    if size is None:
        return {}
    names = NAMES[len(size)]
    if missing := [name for name in names if name not in accepts]:
        own = "samples at a size of its own" if "height" in missing else "makes no videos"
        raise InputError(f"--size {show_size(size)}: {pipeline} {own}: it takes no {missing[0]}")
    return dict(zip(names, size, strict=True))
