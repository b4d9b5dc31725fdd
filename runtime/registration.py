"""Registering with diffusers without importing it: the moment diffusers loads its quantizers, ours joins them.

diffusers takes seconds to import and has no entry point for quantizers. So that `import vdit_quant` stays instant and
plain `from_pretrained` works after it, a finder waits for the one module that holds the quantizer tables.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

TARGET = "diffusers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    """Runs the target's own loader, then registers."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register() -> None:
    from .diffusers_plugin import register

    register()


def register_with_diffusers() -> None:
    """Registers now when diffusers has loaded its quantizers, else as soon as it does; safe to call again."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
