"""The layers of an artifact whose model class is not here, as its files tell them: names and shapes, for `inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..quantize.errors import InputError
from ..quantize.layer import layer_layout
from ..quantize.spec import LayerSpec
from .artifact import DTYPES, ArtifactConfig
from .checkpoint import Checkpoint

Traits = dict[str, tuple[tuple[int, ...], str]]
BITS = (2, 3, 4, 6, 8, 16)  # of a stored element; one code of a codebook counts for its elements


def stand_in(config: ArtifactConfig, checkpoint: Checkpoint) -> nn.Module:
    """A module that holds the compressed layers as `nn.Linear`s on the meta device, under their names.

    Raises InputError for a layer of the rules whose tensors fit no shape.
    """
    layers: dict[str, Traits] = {}
    for name, traits in checkpoint.headers.items():
        layer, _, key = name.rpartition(".")
        if config.spec_of(layer) is not None:
            layers.setdefault(layer, {})[key] = traits
    model, known = nn.Module(), dict[str, tuple[int, int] | None]()
    for layer, found in layers.items():
        spec = config.spec_of(layer)
        if spec is None or "weight" not in found:
            continue
        alike = f"{spec.name} {sorted(found.items())}"
        if alike not in known:
            known[alike] = find_shape(found, spec)
        shape = known[alike]
        if shape is None:
            held = ", ".join(f"{key} {dtype} {list(shape)}" for key, (shape, dtype) in found.items())
            raise InputError(f"{checkpoint.folder}: config and tensors disagree: {layer} as {spec.name} holds {held}")
        with torch.device("meta"):
            _add(model, layer, nn.Linear(shape[1], shape[0], bias="bias" in found))
    return model


def find_shape(found: Mapping[str, tuple[tuple[int, ...], str]], spec: LayerSpec) -> tuple[int, int] | None:
    """The (N, K) of which a layer of this spec stores these tensors; where padding hides K, the largest."""
    stored = {key: (shape, DTYPES.get(dtype)) for key, (shape, dtype) in found.items() if key != "bias"}
    shape, dtype = stored["weight"]
    if len(shape) != 2 or dtype is None:
        return None
    for k in _widths(shape[1] * dtype.itemsize):
        try:
            layout = layer_layout(shape[0], k, spec)
        except InputError:
            continue
        if {key: (tensor.shape, tensor.dtype) for key, tensor in layout.items()} == stored:
            return shape[0], k
    return None


def _widths(row_bytes: int) -> Iterator[int]:
    """Numbers of elements that may be stored in a row of so many bytes, the last ones padded."""
    for bits in BITS:
        most = 8 * row_bytes // bits
        yield from range(most, max(most - 8, 0), -1)


def _add(model: nn.Module, name: str, layer: nn.Module) -> None:
    *parents, last = name.split(".")
    for part in parents:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.add_module(last, layer)
