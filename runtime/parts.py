"""Layers that are stored as one weight, so that one product computes all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.format import Tensors
from ..quantize.spec import FormatSpec
from .linear import CompressedLinear
from .watch import has_other_forward

MAX_JOINED = 256
"""Layers that are stored as one: their numbers fit a byte."""


Place = tuple[nn.Module, str]
"""A module and the name of one of its submodules, whichever that is at the time: a LoRA puts another one there."""


@dataclass(frozen=True)
class Part:
    """Layers in a row that are stored alike, as one weight: their tensors are views of `tensors`.

    Low-rank branches are among these: `proj_down` [L * R, K] of all layers, `proj_up` [N, R] by rows, as the weight is.
    `proj_owner` uint8 [N / U], which is never stored, says whose U rows in turn are.
    """

    tensors: Tensors
    bias: Tensor | None
    spec: FormatSpec
    sizes: list[int]

    @property
    def down(self) -> Tensor | None:
        return self.tensors.get("proj_down")

    def branch(self, low: Tensor) -> list[Tensor]:
        """The branch as `int8_linear_low_rank` takes it; low: [M, L * R]."""
        found = [low, self.tensors["proj_up"]]
        return [*found, self.tensors["proj_owner"]] if len(self.sizes) > 1 else found


def layers_at(places: Sequence[Place]) -> tuple[nn.Module, ...]:
    """The modules that are at these places now."""
    return tuple(parent._modules[name] for parent, name in places)  # type: ignore[misc]


def is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` does what its tensors say and nothing else: no hook, no wrapper, no lifted quantiser."""
    if not isinstance(layer, CompressedLinear) or layer.is_lifted:
        return False
    return not is_hooked(layer)


def is_hooked(layer: nn.Module) -> bool:
    """Whether a call of `layer` does something that was put on it."""
    if torch.compiler.is_compiling():  # hooks put on a layer after compiling are not seen by torch.compile either
        return False
    return bool(layer._forward_hooks or layer._forward_pre_hooks) or has_other_forward(layer)


def are_equal(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or torch.equal(one, other)


def is_stale(layers: tuple[nn.Module, ...], parts: list[Part]) -> bool:
    """Whether the layers' tensors are no longer those of `parts`: moved to a device, or loaded anew."""
    owners = [part for part in parts for _ in part.sizes]
    if len(owners) != len(layers):
        return True
    return any(
        _place(a._buffers["weight"]) != _place(b.tensors["weight"]) or _place(a.bias) != _place(b.bias)
        for a, b in zip(layers, owners, strict=True)
    )


def _place(tensor: Any) -> int | None:
    return None if tensor is None else tensor.untyped_storage().data_ptr()


def merge(layers: tuple[nn.Module, ...]) -> list[Part]:
    """Stores layers in a row that have one weight format, rotation and rank, and all a bias or none, as one weight."""
    runs: list[list[CompressedLinear]] = []
    for layer in layers:
        assert isinstance(layer, CompressedLinear)
        last = runs[-1][-1] if runs else None
        if last is not None and len(runs[-1]) < MAX_JOINED and _can_join(last, layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [_join(run) for run in runs]


def _can_join(one: CompressedLinear, other: CompressedLinear) -> bool:
    fmt = one.spec.weight.resolve()
    same = one.spec.weight == other.spec.weight and one.spec.hadamard == other.spec.hadamard
    same = same and one.spec.rank == other.spec.rank and (one.bias is None) == (other.bias is None)
    joins = fmt.by_rows or len(fmt.stacked) > 0
    return same and joins and all(are_equal(one.tensors()[n], other.tensors()[n]) for n in fmt.shared)


def _join(layers: list[CompressedLinear]) -> Part:
    spec, sizes = layers[0].spec.weight, [layer.out_features for layer in layers]
    fmt = spec.resolve()
    names = [*fmt.layout(layers[0].out_features, layers[0].in_features, spec)]
    names += ["proj_down", "proj_up"] if layers[0].spec.rank else []
    if len(layers) == 1:
        bias = layers[0].bias
        return Part({name: layers[0]._buffers[name] for name in names}, bias, spec, sizes)  # type: ignore[misc]
    tensors = {name: layers[0].tensors()[name] for name in fmt.shared}
    for name in names:
        if name in tensors:
            continue
        each = [layer.tensors()[name] for layer in layers]
        tensors[name] = torch.cat(each)
        for layer, view in zip(layers, tensors[name].split([len(t) for t in each]), strict=True):
            layer._buffers[name] = view
    device = layers[0].tensors()["weight"].device
    if fmt.stacked:
        tensors["weight_owner"] = _owners(sizes).to(device)
    if layers[0].spec.rank:
        unit = math.gcd(*sizes)
        tensors["proj_owner"] = _owners([size // unit for size in sizes]).to(device)
    if layers[0].bias is None:
        return Part(tensors, None, spec, sizes)
    biases = torch.cat([layer.bias.detach() for layer in layers])
    for layer, view in zip(layers, biases.split(sizes), strict=True):
        layer.bias = nn.Parameter(view, requires_grad=False)
    return Part(tensors, biases, spec, sizes)


def _owners(sizes: list[int]) -> Tensor:
    """uint8 [sum of sizes]: the number of the layer that each belongs to."""
    return torch.arange(len(sizes), dtype=torch.uint8).repeat_interleave(torch.tensor(sizes))


def reads_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether both do the same to one input before they quantise or multiply it."""
    assert isinstance(one, CompressedLinear)
    assert isinstance(other, CompressedLinear)
    if any(getattr(one.spec, part) != getattr(other.spec, part) for part in ("activation", "pre_scale", "hadamard")):
        return False
    if one.in_features != other.in_features:
        return False
    if one.tensors()["weight"].device != other.tensors()["weight"].device:  # blocks may be moved one by one
        return False
    names = ("pre_quant_scale", "hadamard_signs")
    pairs = [(one._buffers.get(name), other._buffers.get(name)) for name in names]
    return all(a is None or (b is not None and are_equal(a, b)) for a, b in pairs)
