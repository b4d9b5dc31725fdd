"""Training a compressed block against the block it replaces, on what the model meets in its own sampling runs.

The model runs on noise and conditions alone. Blocks are trained in order: each reads what the compressed blocks before
it give, and is held to the output of the full-precision model, so that it also repairs what came before. At a time one
block's codes are soft, and one batch of calls is held.

    loss = |y' - y|^2 / |y - mean|^2  +  ratio * progress * R  +  slope * (1 - <y' - mean, y - mean> / |y - mean|^2)^2

y' the block's output, y that of full precision, mean over the batch, R the mixtures' distance from one candidate each
(see `soft_codes`). The first and the last term are summed over the streams of a block that returns several (image and
text), each beside its own power: the larger would hide the other. The last term is not in the paper: the least squared
error shrinks an output, at every sampling step alike, and that sums up. (VQ4DiT, Deng et al. 2024, arXiv 2408.17131,
section 3.3; it trains all blocks together.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.errors import InputError
from ..quantize.format import Tensors
from ..quantize.layer import dense_weight
from ..runtime.attach import attach_settled, detach
from ..runtime.family import Family
from .block_input import BlockInput, Streams, rows_of, streams
from .captured_step import CapturedStep
from .plan import LayerPlan
from .probe import Call, capture, probe_steps
from .progress import Progress
from .soft_codes import SoftCodes
from .trained_blocks import is_tuned

STEPS = 10  # sampling steps that calls are taken from
ROWS = 32  # batch rows of a training step
SOFT = 0.8  # the part of the training in which codes are still mixtures


class BlockTuner:
    """Trains blocks one by one; until `close`, `model` holds every compressed layer.

    run  runs `model` through sampling: calls of `steps` steps a sample; called once
    steps  None: any calls, all of which are trained on
    """

    def __init__(
        self, model: nn.Module, family: Family, run: Callable[[], Any], steps: int | None, progress: Progress
    ) -> None:
        self.model, self.progress = model, progress
        self.trained = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self.originals: dict[str, nn.Linear] = {}
        few = None if steps is None else probe_steps(steps, STEPS)
        try:
            self.calls: list[Call] = capture(model, family, run, few, limit=1024)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Puts the model back to what it was."""
        detach(self.model, self.originals)
        for parameter in self.trained:
            parameter.requires_grad_(True)

    def attach(self, layers: Sequence[LayerPlan], tensors: Tensors) -> None:
        """Puts a finished block's layers in place."""
        specs = {layer.name: layer.spec for layer in layers if layer.spec is not None}
        held = {name: _own(tensors, name) for name in specs}
        biases = {name: parts.pop("bias", None) for name, parts in held.items()}
        self.originals.update(attach_settled(self.model, specs, held))
        for name, bias in biases.items():
            if bias is not None:
                layer: Any = self.model.get_submodule(name)
                layer.bias.data.copy_(bias)

    def tune(self, block: str, layers: Sequence[LayerPlan], tensors: Tensors) -> Tensors:
        """The tensors of the block's layers after training, the trained biases among them; attaches them too."""
        if any(map(is_tuned, layers)):
            tensors = {**tensors, **self._train(block, layers, tensors)}
        self.attach(layers, tensors)
        return tensors

    def _train(self, block: str, layers: Sequence[LayerPlan], tensors: Tensors) -> Tensors:
        params = next(layer.full_params() for layer in layers if is_tuned(layer))
        targets = self._full_precision(block)
        pairs = zip(self.calls, targets, strict=True)
        inputs = [self._input(block, call, len(given[0])) for call, given in pairs]
        module = self.model.get_submodule(block)
        soft: dict[str, SoftCodes] = {}
        before = {layer.name: self.model.get_submodule(layer.name) for layer in layers}
        for layer in layers:
            new = self._trainable(layer, _own(tensors, layer.name))
            self.model.set_submodule(layer.name, new)
            if isinstance(new, SoftCodes):
                soft[layer.name] = new
        try:
            with torch.enable_grad():
                first, last = fit_block(module, list(soft.values()), inputs, targets, params)
        finally:
            for name, old in before.items():
                self.model.set_submodule(name, old)
        self.progress.note(f"{block}: error {first:.4f} before training, {last:.4f} after")
        found = {}
        for name, new in soft.items():
            found.update({f"{name}.{key}": t.cpu().contiguous() for key, t in new.store().items()})
            if new.bias is not None:
                found[f"{name}.bias"] = new.bias.detach().cpu()
        return found

    def _trainable(self, plan: LayerPlan, tensors: Tensors) -> nn.Module:
        old: Any = self.model.get_submodule(plan.name)
        plan = plan.settled(tensors)
        assert plan.spec is not None
        held = {key: t.to(old.weight.device) for key, t in tensors.items() if key != "bias"}
        if is_tuned(plan):
            return SoftCodes(held, plan.spec, old.weight.float(), old.bias, plan.full_params()["candidates"])
        new = nn.Linear(plan.k, plan.n, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        new.weight.data.copy_(dense_weight(held, plan.k, plan.spec))
        if old.bias is not None:
            new.bias.data.copy_(old.bias)
        return new.requires_grad_(False)

    def _input(self, block: str, call: Call, rows: int) -> BlockInput:
        fewer = None if call.first is None else _observe(self.model, block, call.first)[0]
        return BlockInput.of(_observe(self.model, block, call)[0], rows, fewer)

    def _full_precision(self, block: str) -> list[Streams]:
        """The block's outputs in the model without any compressed layer."""
        compressed = {name: self.model.get_submodule(name) for name in self.originals}
        for name, layer in self.originals.items():
            self.model.set_submodule(name, layer)
        try:
            return [_observe(self.model, block, call, output=True)[1] for call in self.calls]
        finally:
            for name, new in compressed.items():
                self.model.set_submodule(name, new)


def fit_block(
    module: nn.Module,
    layers: Sequence[SoftCodes],
    inputs: Sequence[BlockInput],
    targets: Sequence[Streams],
    params: dict[str, Any],
) -> tuple[float, float]:
    """Trains the soft layers of `module`; returns the relative squared error, summed over streams, before and after.
    Training that does not lower it is undone.

    inputs   of the block in every call;  targets: what the block gives then, see `streams`
    """
    count = params["steps"]
    generator = torch.Generator().manual_seed(0)
    before = [layer.snapshot() for layer in layers]
    first = sum(hard_errors(module, layers, inputs, targets))
    step = training_step(module, layers, params)
    soft, hard = CapturedStep(step), CapturedStep(step)
    done = torch.arange(count, device=layers[0].logits.device) / count
    pull, decay = params["ratio"] * done, (1 + torch.cos(torch.pi * done)) / 2
    for number in range(count):
        run = hard if layers[0].hard else soft
        run((*draw(inputs, targets, generator), pull[number], decay[number]))
        if number >= SOFT * count:
            for layer in layers:
                layer.harden(0.0)
    last = sum(hard_errors(module, layers, inputs, targets))
    if not last < first:
        for layer, values in zip(layers, before, strict=True):
            layer.restore(values)
        return first, first
    return first, last


def training_step(
    module: nn.Module, layers: Sequence[SoftCodes], params: dict[str, Any]
) -> Callable[[tuple[Any, Any, Streams, Tensor, Tensor]], None]:
    """A step on (args, kwargs, targets, the weight of the ratio loss, the part of the learning rates that is left)."""
    device = layers[0].logits.device
    slow = [p for layer in layers for p in (layer.book, layer.gain, layer.bias) if p is not None]
    rates = [torch.tensor(params[name], device=device) for name in ("rate", "book_rate")]
    optimizer = torch.optim.Adam(
        [
            {"params": weights, "lr": rate.clone()}
            for weights, rate in zip(([layer.logits for layer in layers], slow), rates, strict=True)
        ],
        capturable=device.type == "cuda",
    )

    def step(batch: tuple[Any, Any, Streams, Tensor, Tensor]) -> None:
        args, kwargs, targets, pull, decay = batch
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"].copy_(rate * decay)
        pairs = zip(streams(module(*args, **kwargs)), targets, strict=True)
        error, slope = torch.stack([torch.stack(_losses(*pair)) for pair in pairs]).sum(0)
        ratio = torch.stack([layer.ratio_loss() for layer in layers]).mean()
        optimizer.zero_grad(set_to_none=True)
        (error + params["slope"] * slope + pull * ratio).backward()
        optimizer.step()
        for layer in layers:
            layer.harden(params["harden"])

    return step


def draw(
    inputs: Sequence[BlockInput], targets: Sequence[Streams], generator: torch.Generator
) -> tuple[Any, Any, Streams]:
    """(args, kwargs, targets) of `ROWS` random rows of a random call."""
    number = int(torch.randint(len(inputs), (1,), generator=generator))
    given = targets[number]
    chosen = torch.randperm(len(given[0]), generator=generator)[:ROWS].to(given[0].device, non_blocking=True)
    return *inputs[number].rows(chosen), rows_of(given, chosen)


def _losses(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of one stream the relative squared error, and the squared departure of the slope of output on target from 1."""
    output, target = output.float(), target.float()
    mean = target.mean(tuple(range(target.dim() - 1)), keepdim=True)
    centred = target - mean
    power = centred.square().sum().clamp_min(1e-20)
    return (output - target).square().sum() / power, (1 - ((output - mean) * centred).sum() / power).square()


@torch.no_grad()
def hard_errors(
    module: nn.Module, layers: Sequence[SoftCodes], inputs: Sequence[BlockInput], targets: Sequence[Streams]
) -> list[float]:
    """Each stream's relative squared error over all calls with every run as its largest candidate."""
    states = [layer.hard for layer in layers]
    for layer in layers:
        layer.hard = True
    errors: list[list[Tensor]] = [[] for _ in targets[0]]
    for block_input, given in zip(inputs, targets, strict=True):
        for chosen in torch.arange(len(given[0]), device=given[0].device).split(ROWS):
            args, kwargs = block_input.rows(chosen)
            pairs = zip(streams(module(*args, **kwargs)), rows_of(given, chosen), strict=True)
            for found, (output, target) in zip(errors, pairs, strict=True):
                found.append(_losses(output, target)[0])
    for layer, state in zip(layers, states, strict=True):
        layer.hard = state
    return [float(torch.stack(found).mean()) for found in errors]


class _Seen(Exception):
    """The block has run: the rest of the model need not."""


@torch.no_grad()
def _observe(model: nn.Module, block: str, call: Call, output: bool = False) -> tuple[Any, Streams]:
    """((args, kwargs), streams) of one block in one call; the streams only where they are asked for."""
    seen: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        if not output:
            raise _Seen

    def after(module: nn.Module, args: Any, result: Any) -> None:
        seen.append(tuple(stream.detach() for stream in streams(result)))
        raise _Seen

    module = model.get_submodule(block)
    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        call.run(model)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not seen or not seen[-1]:
        found = "returns no activations" if seen else "did not run"
        raise InputError(f"{block} {found}, so it cannot be trained; use steps=0")
    return seen[0], seen[-1] if output else ()


def _own(tensors: Tensors, name: str) -> Tensors:
    """The tensors of one layer, by their names in it."""
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.rpartition(".")[0] == name}
