"""CUDA-graph replay of a denoiser: at small batches a forward is bound by starting its kernels, not by running them.

`replay_graphs(model)` is the switch. Each combination of argument shapes, dtypes and plain values is captured at its
first call and replayed after it; another combination is captured anew, and the least recently used one is dropped
beyond `limit`. A call that cannot be captured (an argument that is neither a tensor nor a plain value, grad mode, a
LoRA, hooks, another attention processor, a CPU) runs as it is; so do calls of a shape whose graph finds no memory, and
every call of a model of which a part cannot be captured, which is logged once.
"""

from __future__ import annotations

import gc
import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..kernels import dispatch
from ..quantize.errors import reason_of
from .capture import PLAIN, Capture, aside, capture_call, capture_key, device_of
from .compile_ahead import compile_ahead
from .linear import CompressedLinear
from .watch import Watch, active_backend, has_hooks, is_own

logger = logging.getLogger("vdit_quant")

WARMUP = 2
_ONE_AT_A_TIME = threading.RLock()
"""Held from the copies of the arguments to those of the results, which a graph has but one of. It is one for all models
because it must not be copied with one."""


class _Method:
    """A bound `GraphedForward.forward` with the signature of the model's own: pipelines choose arguments by it.

    An object, so that it is copied with the model; with slots, as wrappers take over the attributes that they find.
    """

    __slots__ = ("__self__",)

    def __init__(self, graphed: GraphedForward) -> None:
        self.__self__ = graphed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__self__.forward(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__self__.own)


class GraphedForward:
    """A model's forward that captures and replays itself. `captures` counts the graphs made so far."""

    def __init__(self, model: nn.Module, limit: int = 8) -> None:
        self.model = model
        self.own: Callable[..., Any] = model.forward
        self.captures = 0
        self._graphs: OrderedDict[Any, Capture] = OrderedDict()
        self._too_large: set[Any] = set()
        self._pool: Any = None
        self.start(limit)
        # fused blocks store loaded tensors together anew, elsewhere
        self.loaded = [m.register_load_state_dict_post_hook(self.reset) for m in model.modules()]

    def __getstate__(self) -> dict[str, Any]:
        """All but what was captured, which reads this model's weights: a copy captures its own."""
        fresh = {"captures": 0, "_graphs": OrderedDict(), "_too_large": set(), "_pool": None}
        return {**self.__dict__, **fresh}

    def start(self, limit: int) -> None:
        """Captures what the model is now, as if nothing had been captured before."""
        self.limit, self.enabled = limit, True
        self.failure: str | None = None
        # without hooks on the model itself, which run outside its forward, but for those that were there before
        self._watch = Watch(self.model)
        self._hooked_before = vars(self.model).get("_graphed_forward") is None and has_hooks(self.model)
        self._layer = next((m for m in self.model.modules() if _is_quantized(m)), None)
        self.reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _say_compiled(type(self.model).__name__)
            return self.own(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        disturbed = not self.enabled or self._is_disturbed()
        key = None if disturbed else capture_key(leaves, tree, self._state())
        if key is None:
            return self.own(*args, **kwargs)
        with _ONE_AT_A_TIME:
            return self._replay(key, leaves, tree, args, kwargs)

    def _replay(self, key: Any, leaves: list[Any], tree: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if key in self._too_large:
            return self._uncaptured(*args, **kwargs)
        try:
            capture = self._graphs.pop(key, None) or self._capture_in_memory(leaves, tree)
        except RuntimeError as error:
            out = self.own(*args, **kwargs)  # raises what is wrong with the call itself
            self._give_up(error)
            return out
        if capture is None:
            self._too_large.add(key)
            return self._uncaptured(*args, **kwargs)
        self._graphs[key] = capture
        while len(self._graphs) > self.limit:
            self._graphs.popitem(last=False)
        capture.replay(leaves)
        return pytree.tree_map_only(Tensor, Tensor.clone, capture.outputs)

    def stop(self) -> None:
        """Runs the model as it is from now on."""
        self.enabled = False
        self.reset()

    def reset(self, *_: Any) -> None:
        """Drops every graph: needed after moving or replacing a submodule by hand."""
        self._too_large.clear()
        self._drop()

    def _drop(self) -> None:
        self._graphs.clear()
        self._pool = None

    def move(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `_apply`: a graph reads the weights where they were, so moving or casting them voids it."""
        self.reset()
        return type(self.model)._apply(self.model, *args, **kwargs)

    def _is_disturbed(self) -> bool:
        """Whether the model cannot be captured, or something acts inside it that a graph would not see: autograd, a
        LoRA, which is switched and scaled by plain attributes, or what `Watch` sees (caching, offloading, another
        layer or attention)."""
        if self.failure is not None or torch.is_grad_enabled() or getattr(self.model, "_hf_peft_config_loaded", False):
            return True
        return (self._hooked_before and has_hooks(self.model)) or self._watch.is_disturbed()

    def _state(self) -> Any:
        """What changes the kernels that calls of the same shape run: training mode, a step plan, autocast, settings of
        `dispatch`, the back-end of diffusers."""
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        lifted = self._layer is not None and bool(self._layer.is_lifted)
        return self.model.training, lifted, autocast, dispatch.settings(), active_backend()

    def _give_up(self, error: RuntimeError) -> None:
        self.reset()
        self.failure = reason_of(error)
        logger.warning("%s runs without CUDA graphs: %s", type(self.model).__name__, self.failure)

    def _uncaptured(self, *args: Any, **kwargs: Any) -> Any:
        """The call as it is, in place of graphs where there is no memory for both."""
        try:
            return self.own(*args, **kwargs)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self._drop()
        _release()
        return self.own(*args, **kwargs)

    def _capture_in_memory(self, leaves: list[Any], tree: Any) -> Capture | None:
        """`_capture`, again without all other graphs where there is no memory beside them; None where none suffices."""
        reason = None
        for _ in range(2):
            try:
                return self._capture(leaves, tree)
            except RuntimeError as error:
                if (found := _out_of_memory(error)) is None:
                    raise
                reason = reason_of(found)
                del found
            self._drop()  # out here: the error holds what the capture has made so far
            _release()
        shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))
        kind = type(self.model).__name__
        logger.warning("%s runs without a CUDA graph for inputs of shapes %s: %s", kind, shapes, reason)
        return None

    def _capture(self, leaves: list[Any], tree: Any) -> Capture:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        if not self.captures and dispatch.available().backend == "triton":
            args, kwargs = pytree.tree_unflatten(leaves, tree)
            compile_ahead(lambda: self.own(*args, **kwargs), aside(device_of(leaves)))
        found = capture_call(lambda call: self.own(*call[0], **call[1]), leaves, tree, WARMUP, self._pool)
        odd = next((x for x in pytree.tree_leaves(found.outputs) if not isinstance(x, (Tensor, *PLAIN))), None)
        if odd is not None:
            raise RuntimeError(f"its result holds a {type(odd).__name__}, whose tensors would not be copies")
        self.captures += 1
        return found


@torch.compiler.assume_constant_result
def _say_compiled(kind: str) -> None:
    """Runs while torch.compile traces, and leaves nothing in the compiled code."""
    dispatch.remember(
        "CUDA graphs",
        f"torch.compile of {kind}",
        "torch.compile leaves out the CUDA graphs that replay %s, and what it compiles starts every kernel from "
        'Python, which takes longer: run the model as it is loaded, or compile it with mode="reduce-overhead"; '
        "load(..., cuda_graphs=False) says that this is meant",
        kind,
    )


def replay_graphs(model: nn.Module, enabled: bool = True, limit: int = 8) -> nn.Module:
    """Turns CUDA-graph replay of `model` on or off; returns the model.

    limit  graphs that are kept, one for each combination of input shapes
    Outputs are copies: a result stays valid after the next call.
    """
    current: GraphedForward | None = vars(model).get("_graphed_forward")
    if current is not None and getattr(vars(model).get("forward"), "__self__", None) is not current:
        # something was put around it since
        if enabled:
            current.start(limit)
        else:
            current.stop()
        return model
    if current is not None:
        current.stop()
        del model.forward, model._apply, model._graphed_forward
        for handle in current.loaded:
            handle.remove()
        if not is_own(current.own, model):
            model.forward = current.own
    if enabled:
        graphed = GraphedForward(model, limit)
        model.forward, model._graphed_forward = _Method(graphed), graphed  # type: ignore[assignment]
        model._apply = graphed.move  # type: ignore[method-assign]
    return model


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """The error that memory ran out, if any: ending a capture that it broke may raise another one on top."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error


def _release() -> None:
    """Gives what nothing holds back to the GPU: memory of one pool does not serve another."""
    gc.collect()
    torch.cuda.empty_cache()


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, CompressedLinear) and module.spec.activation is not None
