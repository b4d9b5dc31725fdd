"""What acts inside a model besides its tensors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection
from itertools import repeat
from operator import contains, is_not
from typing import Any

from torch import nn


class Watch:
    """Sees hooks on the modules inside `root`, torch's, accelerate's and diffusers', and what was put on them since:
    another `forward` or class, an attention processor, or a back-end or context parallelism for the processor; or
    another module in the place of one.

    A fused or captured forward does not call the modules inside it, so that what is put on them would do nothing.

    called  modules inside that are not watched
    """

    def __init__(self, root: nn.Module, called: Collection[nn.Module] = ()) -> None:
        inside = list(root.modules())
        watched = [m for m in inside[1:] if m not in called]
        known = set(watched)
        places = [(m._modules, name, child) for m in inside for name, child in m._modules.items() if child in known]
        self._parents: list[dict[str, Any]] = [parent for parent, _, _ in places]
        self._names, self._children = [name for _, name, _ in places], [child for _, _, child in places]
        self._typed = [root, *watched]
        self._classes = [type(m) for m in self._typed]
        self._hooks = [hooks for m in watched for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._plain = [m for m in watched if not has_other_forward(m)]
        self._replaced = [(m, vars(m)["forward"]) for m in watched if has_other_forward(m)]
        attentions = [m for m in watched if getattr(m, "processor", None) is not None]
        self._processors = [(m, m.processor, _backend(m.processor)) for m in attentions]
        self._dispatches = any(hasattr(m.processor, "_attention_backend") for m in attentions)

    def is_disturbed(self) -> bool:
        # asked at every call, of hundreds of modules: loops that Python does not interpret
        if any(self._hooks) or any(map(is_not, map(dict.get, self._parents, self._names), self._children)):
            return True
        if any(map(is_not, map(type, self._typed), self._classes)):
            return True
        if any(map(contains, map(vars, self._plain), repeat("forward"))) and any(map(has_other_forward, self._plain)):
            return True
        if any(vars(m).get("forward") != forward or carries_hooks(m) for m, forward in self._replaced):
            return True
        return any(m.processor is not p or _backend(p) != backend for m, p, backend in self._processors)

    def calls_another_backend(self) -> bool:
        """Whether attention inside runs on a back-end that was chosen for all of diffusers, as by
        `diffusers.attention_backend`."""
        return self._dispatches and active_backend() not in (None, "native")


def _backend(processor: Any) -> Any:
    return getattr(processor, "_attention_backend", None), getattr(processor, "_parallel_config", None)


def active_backend() -> Any:
    """The back-end of diffusers' attention processors for which none was chosen; None where there is no such choice."""
    module = sys.modules.get("diffusers.models.attention_dispatch")
    return getattr(getattr(module, "_AttentionBackendRegistry", None), "_active_backend", None)


def has_other_forward(module: nn.Module) -> bool:
    """Whether a `forward` was put on the module that is not its class's own: accelerate and diffusers put that one
    there when they take their hooks away."""
    forward = vars(module).get("forward")
    return forward is not None and not is_own(forward, module)


def is_own(forward: Any, module: nn.Module) -> bool:
    """Whether this is the forward that the module's class gives it."""
    return inspect.ismethod(forward) and forward.__func__ is type(module).forward and forward.__self__ is module


def carries_hooks(module: nn.Module) -> bool:
    """Whether accelerate or diffusers put something around its forward, as offloading and caching do."""
    return "_hf_hook" in vars(module) or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """As `carries_hooks`, of diffusers' alone: accelerate's, on a whole model, may be left out of a graph."""
    return bool(getattr(vars(module).get("_diffusers_hook"), "hooks", None))
