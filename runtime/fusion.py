"""Fused blocks: the same maths as a model's own blocks in fewer passes over memory, without forking the model.

`fuse` gives every block of a known class a forward that runs on `Stage`s; module names, parameters and the model's own
code stay as they are, and `unfuse` takes it away again. A block that is called in a way its fused forward does not
know (a mask, a hook, gradients, another attention processor) runs its own forward for that call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import dispatch
from ..quantize import registry
from . import fusions
from .modulation import Modulation, are_others
from .stage import Place, Stage, layers_at
from .watch import Watch


class FusedBlock:
    """The fused forward of one block. A subclass has the block's own signature and calls `own` for what it refuses.

    cpu  fuse on a CPU too, where it saves nothing: for tests
    """

    loaded: Any  # handle of what runs after the block's tensors have been loaded
    stages: tuple[Stage, ...] = ()
    modulation: Modulation | None = None
    watch: Watch | None = None
    declined: str | None = None  # why the present call is not fused
    index = 0

    def __init__(self, block: nn.Module, cpu: bool = False) -> None:
        self.block: Any = block
        self.cpu = cpu
        self._own = type(block).forward  # found here: torch.compile does not trace the look-up
        self.shared: dict[Any, Any] = {}  # one for all blocks of a model
        self.siblings: tuple[FusedBlock, ...] = (self,)  # the fused blocks of its kind, in order
        self.place = 0  # among them

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own, unfused forward; on an accelerator, says why it runs."""
        if not torch.compiler.is_compiling() and (self.cpu or args[0].device.type != "cpu"):
            reason, self.declined = self.declined or "an argument that its fused forward does not know", None
            kind = type(self.block).__name__
            dispatch.remember(kind, reason, "%s runs its own forward, not the fused one: %s", kind, reason)
        return self._own(self.block, *args, **kwargs)

    def accepts(self, hidden_states: Tensor) -> bool:
        """Whether this call can be fused, as far as its main input and what was done to the block tell."""
        reason = self._refusal(hidden_states)
        if reason is not None and not torch.compiler.is_compiling():
            self.declined = reason
        return reason is None

    def _refusal(self, hidden_states: Tensor) -> str | None:
        if self.block.training or (hidden_states.requires_grad and torch.is_grad_enabled()):
            return "training mode" if self.block.training else "gradients"
        if self.watch is not None and not torch.compiler.is_compiling() and self.watch.is_disturbed():
            return "a hook, or another forward, attention processor or back-end, was put inside it"
        if hidden_states.dim() != 3:
            return f"its input has {hidden_states.dim()} dimensions, not 3"
        return "a CPU" if hidden_states.device.type == "cpu" and not self.cpu else None

    def once(self, name: str, source: Tensor, make: Callable[[], Any], group: Sequence[FusedBlock] = ()) -> Any:
        """What the first block of a group, by default of all, makes of `source` for the others; a block that is given
        another tensor makes its own. Nothing is kept after the last."""
        group = group or self.siblings
        if self is group[0] or name not in self.shared or are_others(self.shared[name][:1], (source,)):
            self.shared[name] = source, make()
        made = self.shared[name][1]
        if self is group[-1]:
            del self.shared[name]
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def move(self, *args: Any, **kwargs: Any) -> Any:
        """The block's `_apply`: what was stored together is stored together again where it has moved to."""
        moved = type(self.block)._apply(self.block, *args, **kwargs)
        self.join()
        return moved

    def rejoin(self, *_: Any) -> None:
        """As `join`, with nothing of what was stored together or made of it before: other tensors were loaded."""
        for stage in self.stages:
            stage.parts = []
        if self.modulation is not None:
            self.modulation.parts = []
        self.join()

    def join(self) -> None:
        """Stores the layers of every stage together, now: a compiled forward cannot."""
        for stage in self.stages:
            stage.ready()
        if self.modulation is not None and self.index == self.modulation.last:
            self.modulation.ready()


class Fusion:
    """How blocks of some class are fused. A new one is one file in `fusions/` that exports `FUSION`."""

    classes: ClassVar[tuple[str, ...]]

    def refusal(self, block: nn.Module) -> str | None:
        """Why this block cannot be fused, whatever its layers hold; None when it can."""
        raise NotImplementedError

    def build(self, block: nn.Module, cpu: bool) -> FusedBlock:
        """The fused block, without its modulation."""
        raise NotImplementedError

    def modulators(self, block: nn.Module) -> list[Place]:
        """Where the linear layers of the block are that turn an embedding into modulation; may be none."""
        return []

    def embedder(self, block: nn.Module) -> nn.Module | None:
        """The block's own embedder, None where it is given the embedding: blocks with one embedder are modulated at
        once."""
        return None


def find_fusion(block: nn.Module) -> Fusion | None:
    """The fusion whose file serves this module."""
    return _by_class().get(type(block).__name__)


@cache
def _by_class() -> dict[str, Fusion]:
    # every module of a model is looked up while it loads: the folder is read once
    package: ModuleType = fusions
    found: list[Fusion] = [registry.find(package, name, "FUSION") for name in registry.names(package)]
    return {kind: fusion for fusion in found for kind in fusion.classes}


def fuse(model: nn.Module, cpu: bool = False) -> nn.Module:
    """Fuses every block of `model` that can be; returns the model. Safe to call again, also after loading a LoRA.

    cpu  also fuse calls on a CPU, where nothing is gained: for tests
    """
    unfuse(model)
    share_embedders(model)
    groups: dict[nn.Module | None, list[tuple[FusedBlock, list[Place]]]] = {}
    shared: dict[Any, Any] = {}
    for module in model.modules():
        fusion = find_fusion(module)
        if fusion is None or fusion.refusal(module) is not None:
            continue
        block = fusion.build(module, cpu)
        if all(stage.refusal() is not None for stage in block.stages):
            continue
        block.shared = shared
        groups.setdefault(fusion.embedder(module), []).append((block, fusion.modulators(module)))
    for members in groups.values():
        modulation = Modulation([layers for _, layers in members])
        for index, (block, layers) in enumerate(members):
            block.index, block.modulation = index, modulation if layers else None
            block.siblings = tuple(other for other, _ in members if type(other) is type(block))
            block.place = block.siblings.index(block)
            block.watch = _watch(block, layers)
            block.block.forward, block.block._apply = block.forward, block.move
            block.loaded = block.block.register_load_state_dict_post_hook(block.rejoin)
            block.join()
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every fused block its own forward back; returns the model."""
    for module in model.modules():
        fused = getattr(module.__dict__.get("forward"), "__self__", None)
        if isinstance(fused, FusedBlock):
            del module.forward, module._apply
            fused.loaded.remove()
    return model


def _watch(fused: FusedBlock, modulators: list[Place]) -> Watch:
    """Of all that the fused forward does not call: a layer is looked at by its stage, and a hook on the block itself
    runs outside its forward."""
    layers = layers_at([*(place for stage in fused.stages for place in stage.places), *modulators])
    called = {fused.block, *(module for layer in layers for module in layer.modules())}
    return Watch(module for module in fused.block.modules() if module not in called)


def share_embedders(model: nn.Module) -> None:
    """Makes repeated, bit-equal embedders one module: DiT in diffusers holds the timestep and label embedder once in
    every block."""
    first: dict[str, Any] = {}
    shared = False
    for module in list(model.modules()):
        embedder = getattr(module, "emb", None)
        if not isinstance(embedder, nn.Module) or not any(True for _ in embedder.parameters()):
            continue
        known = first.setdefault(type(embedder).__name__, embedder)
        if known is not embedder and _equal(known, embedder):
            module.emb, shared = known, True
    if shared and _write_each not in model._state_dict_hooks.values():
        model._register_state_dict_hook(_write_each)


def _write_each(model: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """A saved model holds a shared embedder in every block again, as its class expects."""
    seen = set()
    for name, tensor in state.items():
        if (place := (tensor.data_ptr(), tensor.shape)) in seen and tensor.device.type != "meta":
            state[name] = tensor.clone()
        seen.add(place)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[k].device == right[k].device != torch.device("meta")
        and left[k].dtype == right[k].dtype
        and torch.equal(left[k], right[k])
        for k in left
    )


def report(model: nn.Module, blocks: Iterable[str]) -> dict[str, str]:
    """Class of block -> how many of its blocks a GPU runs fused, and why others are not. For `inspect`.

    model   compressed; may lie on the meta device, where layers of equal specs are taken to share scales and signs
    blocks  full names of its repeated blocks
    """
    found: dict[str, Counter[str]] = {}
    for name in blocks:
        block = model.get_submodule(name)
        found.setdefault(type(block).__name__, Counter())[_verdict(block)] += 1
    return {kind: ", ".join(f"{n} {why}" for why, n in verdicts.items()) for kind, verdicts in found.items()}


def _verdict(block: nn.Module) -> str:
    fusion = find_fusion(block)
    if fusion is None:
        return "not fused (no fusion knows this class)"
    if (reason := fusion.refusal(block)) is not None:
        return f"not fused ({reason})"
    refusals = [stage.refusal() for stage in fusion.build(block, cpu=True).stages]
    reasons = "; ".join(sorted({reason for reason in refusals if reason is not None}))
    if not reasons:
        return "fused"
    return f"not fused ({reasons})" if None not in refusals else f"partly fused ({reasons})"
