"""Registering with diffusers without importing it: the moment diffusers loads its quantizers, ours joins them.

diffusers takes seconds to import and has no entry point for quantizers. So that `import vdit_quant` stays instant and
plain `from_pretrained` works after it, a finder waits for the module that holds the quantizer tables, and for that of
the LoRA loaders.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _Loader(importlib.abc.Loader):
    """Runs the target's own loader, then `after`."""

    def __init__(self, loader: Any, after: Callable[[ModuleType], None]) -> None:
        self.loader, self.after = loader, after

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.after(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TARGETS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, TARGETS[fullname])
        return spec


def _register(_: ModuleType) -> None:
    from .diffusers_plugin import register

    register()


def _teach_shapes(loaders: ModuleType) -> None:
    from .lora import teach_shapes

    teach_shapes(loaders)


TARGETS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.quantizers.auto": _register,
    "diffusers.loaders.lora_pipeline": _teach_shapes,
}
"""Modules of diffusers, and what is done once each is loaded."""


def register_with_diffusers() -> None:
    """Registers now what diffusers has loaded, and the rest as soon as it does; safe to call again."""
    for name, after in TARGETS.items():
        if name in sys.modules:
            after(sys.modules[name])
    if not TARGETS.keys() <= sys.modules.keys() and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
