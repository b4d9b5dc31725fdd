"""The one exception that means "the input is wrong", and helpers that word it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used: a path, a name, a shape, a file. The message says what was expected
    and what was found; the command line prints it alone, without a traceback, and exits with code 2."""


class OutputError(InputError):
    """There is no room, for now: on the disk for the output, or in memory for a step. Finished work stays where a
    resumed run finds it."""


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unknown(kind: str, name: str, options: Iterable[str], where: str = "") -> InputError:
    """The error for a name that is not one of `options`: lists them and suggests the nearest.

    >>> str(unknown("format", "int5", ["int4", "int8"]))
    "unknown format 'int5'; did you mean 'int4'? Known: int4, int8"
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    place = f"{where}: " if where else ""
    return InputError(f"{place}unknown {kind} '{name}'{hint} Known: {', '.join(known) or 'none'}")
