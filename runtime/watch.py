"""What acts inside a model besides its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class Watch:
    """Sees hooks on these modules, and what was put on them since: another `forward`, an attention processor, or a
    back-end for the processor.

    A fused or captured forward does not call the modules inside it, so that what is put on them would do nothing.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        watched = list(modules)
        self._forwards = [(m, m.__dict__.get("forward")) for m in watched]
        self._processors = [(m, p, _backend(p)) for m in watched if (p := getattr(m, "processor", None)) is not None]

    def is_disturbed(self) -> bool:
        return any(
            m._forward_hooks or m._forward_pre_hooks or m.__dict__.get("forward") != own for m, own in self._forwards
        ) or any(m.processor is not p or _backend(p) != backend for m, p, backend in self._processors)


def _backend(processor: Any) -> Any:
    return getattr(processor, "_attention_backend", None)
