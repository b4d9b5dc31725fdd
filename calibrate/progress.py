"""How a long run reports itself, without knowing who listens."""

from __future__ import annotations


class Progress:
    """Listener of a run; the base class stays silent. The command line draws bars and ETAs with it."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins."""

    def advance(self, done: int, detail: str = "") -> None:
        """`done` units of the current stage are finished; `detail` names what is being worked on."""

    def note(self, message: str) -> None:
        """Something worth one line."""
