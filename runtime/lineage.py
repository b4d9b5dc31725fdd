"""What a model folder says about the model that it was pruned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import read_json

SIDECAR = "prune.json"
# what a result follows from; the rest of the record tells how the training went
_SHORT = ("tool", "source", "source_fingerprint", "settings", "plan", "recovered")


def is_pruned(folder: Path) -> bool:
    """Whether `folder` is a transformer that `vdit-quant prune` wrote."""
    return (folder / SIDECAR).exists() and (folder / "config.json").exists()


def short_record(transformer: Path) -> dict[str, Any] | None:
    """The sidecar's plan and provenance, for the record of what is made from the model; None without a sidecar.

    Raises InputError for a sidecar that is no JSON object.
    """
    if not is_pruned(transformer):
        return None
    record = read_json(transformer / SIDECAR)
    return {key: record[key] for key in _SHORT if key in record}
