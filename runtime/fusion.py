"""Fused blocks: the same maths as a model's own blocks in fewer passes over memory, without forking the model.

`fuse` gives every block of a known class a forward that runs on `Stage`s; module names, parameters and the model's own
code stay as they are, and `unfuse` takes it away again. A block that is called in a way its fused forward does not
know (a mask, a hook, gradients, another attention processor) runs its own forward for that call.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import dispatch
from ..quantize import registry
from . import fusions
from .embedders import share_embedders
from .modulation import Modulation, are_others, origin
from .parts import Place, layers_at
from .stage import Stage
from .watch import Watch, has_other_forward

logger = logging.getLogger("vdit_quant")


class FusedBlock:
    """The fused forward of one block. A subclass has the block's own signature and calls `own` for what it refuses.

    cpu  fuse on a CPU too, where it saves nothing: for tests
    """

    loaded: tuple[Any, ...] = ()  # handles of what runs after tensors of the block have been loaded
    released: bool = False  # unfused, where something around the block still calls it
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
        if torch.compiler.is_compiling():
            return self._own(self.block, *args, **kwargs)
        if self.cpu or args[0].device.type != "cpu":
            reason, self.declined = self.declined or "an argument that its fused forward does not know", None
            kind = type(self.block).__name__
            dispatch.remember(kind, reason, "%s runs its own forward, not the fused one: %s", kind, reason)
        return type(self.block).forward(self.block, *args, **kwargs)  # the class may be another one by now

    def accepts(self, hidden_states: Tensor) -> bool:
        """Whether this call can be fused, as far as its main input and what was done to the block tell."""
        reason = self._refusal(hidden_states)
        if reason is not None and not torch.compiler.is_compiling():
            self.declined = reason
        return reason is None

    def is_wrapped(self) -> bool:
        """Whether something was put around the block since, such as offloading or a cache."""
        return vars(self.block).get("forward") != self.forward

    def is_held(self) -> bool:
        """Whether something around the block may move its tensors at every call, keeping track of them by identity, as
        offloading does: they must stay stored as they are."""
        return self.is_wrapped() or bool(self.block._forward_hooks or self.block._forward_pre_hooks)

    def _refusal(self, hidden_states: Tensor) -> str | None:
        if self.released:
            return "it was unfused"
        if self.block.training or (hidden_states.requires_grad and torch.is_grad_enabled()):
            return "training mode" if self.block.training else "gradients"
        if self.watch is not None and not torch.compiler.is_compiling() and self.watch.is_disturbed():
            return "a hook, or another module, forward, attention processor or back-end, was put inside it"
        if self.watch is not None and not torch.compiler.is_compiling() and self.watch.calls_another_backend():
            return "an attention back-end was chosen"
        if hidden_states.dim() != 3:
            return f"its input has {hidden_states.dim()} dimensions, not 3"
        return "a CPU" if hidden_states.device.type == "cpu" and not self.cpu else None

    def once(self, name: str, source: Tensor, make: Callable[[], Any], group: Sequence[FusedBlock] = ()) -> Any:
        """What the first block of a group, by default of all, makes of `source` for the others; a block that is given
        another tensor makes its own. Nothing is kept after the last."""
        group = group or self.siblings
        key = name, group[0].place  # what a group has left behind, its last block not being fused, is no other's
        if self is group[0] or key not in self.shared or are_others(self.shared[key][0], (source,)):
            self.shared[key] = origin((source,)), make()
        made = self.shared[key][1]
        if self is group[-1]:
            del self.shared[key]
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def move(self, *args: Any, **kwargs: Any) -> Any:
        """The block's `_apply`: what was stored together is stored together again where it has moved to."""
        moved = type(self.block)._apply(self.block, *args, **kwargs)
        self.join()
        return moved

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The block's `compile`, of which a fused block has no use: what blocks share would make each a graph of its
        own, and Python would start every kernel, where a CUDA graph can."""
        if self.released:
            type(self.block).compile(self.block, *args, **kwargs)
            return
        _tell_compiled()

    def rejoin(self, *_: Any) -> None:
        """As `join`, with nothing of what was stored together or made of it before: other tensors were loaded."""
        for stage in self.stages:
            stage.forget()
        if self.modulation is not None:
            self.modulation.forget()
        self.join()

    def attach(self, modulators: list[Place]) -> None:
        """Makes this the forward of the block, whose modulation layers are at `modulators`."""
        block = self.block
        self.watch = _watch(self, modulators)
        block.forward, block._apply, block.compile, block._fused_block = self.forward, self.move, self.compile, self
        # a layer may be loaded by itself
        single = [(layer, stage.forget) for stage in self.stages for layer in stage.layers]
        if self.modulation is not None:
            single += [(layer, self.modulation.forget) for layer in layers_at(modulators)]
        # the block's own is the last to run: it stores together what its layers' have forgotten
        hooks = [(block, self.rejoin), *single]
        self.loaded = tuple(module.register_load_state_dict_post_hook(call) for module, call in hooks)
        for stage in self.stages:
            stage.keeps = self.is_held
        self.join()

    def detach(self) -> None:
        """Gives the block its own forward back, or runs it from now on where something around it calls this one."""
        self.released = self.is_wrapped()
        if self.released:
            return
        del self.block.forward, self.block._apply, self.block.compile, self.block._fused_block
        for handle in self.loaded:
            handle.remove()

    def join(self) -> None:
        """Stores the layers of every stage together, now: a compiled forward cannot."""
        for stage in self.stages:
            stage.ready()
        if self.modulation is not None and self.index == self.modulation.last:
            self.modulation.ready()


@cache
def _tell_compiled() -> None:
    logger.warning("fused blocks are not compiled one by one: they run on kernels of their own already")


class Fusion:
    """How blocks of some class are fused. A new one is one file in `fusions/` that exports `FUSION`."""

    classes: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]] = ("diffusers", __name__.partition(".")[0])  # where these are defined

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
    """The fusion whose file serves this module. A class of one's own may have the name of another's block."""
    kind = type(block).__name__
    fusion = _by_class().get(kind)
    if fusion is None:
        return None
    origins = {known.__module__.partition(".")[0] for known in type(block).__mro__ if known.__name__ == kind}
    return None if origins.isdisjoint(fusion.packages) else fusion


@cache
def _by_class() -> dict[str, Fusion]:
    # every module of a model is looked up while it loads: the folder is read once
    package: ModuleType = fusions
    found: list[Fusion] = [registry.find(package, name, "FUSION") for name in registry.names(package)]
    return {kind: fusion for fusion in found for kind in fusion.classes}


def fuse(model: nn.Module, cpu: bool = False) -> nn.Module:
    """Fuses every block of `model` that can be; returns the model. Safe to call again, also after loading a LoRA.

    cpu  also fuse calls on a CPU, where nothing is gained: for tests
    A block that something was put around, such as offloading or a cache, stays as it is: fused if it was before.
    """
    for fused in _fused(model):
        if fused.is_wrapped():
            fused.released = False
        else:
            fused.detach()
    share_embedders(model)
    groups: dict[nn.Module | None, list[tuple[FusedBlock, list[Place]]]] = {}
    shared: dict[Any, Any] = {}
    for module in model.modules():
        fusion = find_fusion(module)
        if fusion is None or fusion.refusal(module) is not None:
            continue
        if has_other_forward(module):
            if "_fused_block" not in vars(module):
                kind, reason = type(module).__name__, "something was put around it before it was fused"
                dispatch.remember(kind, reason, "%s runs its own forward, not the fused one: %s", kind, reason)
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
        modulation.keeps = partial(any_held, [block for block, _ in members])
        for block, layers in members:
            block.attach(layers)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every fused block its own forward back; returns the model."""
    for fused in _fused(model):
        fused.detach()
    return model


def _fused(model: nn.Module) -> list[FusedBlock]:
    found = [vars(module).get("_fused_block") for module in model.modules()]
    return [fused for fused in found if fused is not None]


def any_held(blocks: Sequence[FusedBlock]) -> bool:
    """Whether one of these blocks is held (`FusedBlock.is_held`)."""
    return any(block.is_held() for block in blocks)


def _watch(fused: FusedBlock, modulators: list[Place]) -> Watch:
    """Of all that the fused forward does not call: a layer is looked at by its stage, and a hook on the block itself
    runs outside its forward."""
    layers = layers_at([*(place for stage in fused.stages for place in stage.places), *modulators])
    called = {fused.block, *(module for layer in layers for module in layer.modules())}
    return Watch(fused.block, called)


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
