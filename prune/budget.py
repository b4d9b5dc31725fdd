"""How long a stage of training lasts: a number of steps, or time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..quantize.errors import InputError

_UNITS = {"": 0.0, "steps": 0.0, "s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Duration:
    """`steps` of training, or as many as fit into `seconds` (the number is fixed once, when the rate is known)."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str | int, where: str = "") -> Duration:
        """ "3000", "3000steps", "90s", "8min" or "2h". Raises InputError, after `where`, for anything else."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(steps|s|min|h|)", str(text).strip())
        if match is None:
            raise InputError(f"{where}'{text}': expected a number of steps or a time, such as 3000, 90s, 8min or 2h")
        number, unit = float(match[1]), _UNITS[match[2]]
        if unit:
            return cls(seconds=number * unit)
        if number != int(number):
            raise InputError(f"{where}'{text}': expected a whole number of steps")
        return cls(steps=int(number))

    @property
    def is_none(self) -> bool:
        return not self.steps and not self.seconds

    def __str__(self) -> str:
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.seconds or 0:.0f} s"
