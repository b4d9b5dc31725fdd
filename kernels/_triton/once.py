"""Compiled kernels by what they are compiled for, each compiled once."""

from collections.abc import Callable
from threading import Lock
from typing import Any


class Once:
    """Key -> what was made for it."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._making: dict[Any, Lock] = {}

    def get(self, key: Any) -> Any:
        """What was made for `key`; None where nothing was yet."""
        return self._made.get(key)

    def make(self, key: Any, first: Callable[[], Any]) -> Any | None:
        """`first()`, kept for `key`: None. Where another thread has made it, or is about to: that, without a call."""
        with self._making.setdefault(key, Lock()):
            if (found := self._made.get(key)) is not None:
                return found
            self._made[key] = first()
            return None

    def clear(self) -> None:
        """Forget everything."""
        self._made.clear()
