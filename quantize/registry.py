"""Plug-ins found by file name: a format, method, family, criterion or command is one file in one folder."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from .errors import unknown


def names(package: ModuleType) -> list[str]:
    """Names of the plug-ins in `package`: its public modules, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def find(package: ModuleType, name: str, attribute: str) -> Any:
    """The `attribute` that plug-in `name` of `package` exports.

    Raises InputError, listing the known names, when there is no such file.
    """
    if name not in names(package):
        kind = package.__name__.rsplit(".", 1)[-1].removesuffix("s").replace("familie", "family")
        raise unknown(kind, name, names(package))
    return getattr(importlib.import_module(f"{package.__name__}.{name}"), attribute)
