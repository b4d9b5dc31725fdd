"""Swapping the linear layers of a model for compressed ones, and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from ..quantize.errors import InputError, unknown
from ..quantize.format import Tensors
from ..quantize.layer import check_shape, settled_spec
from ..quantize.spec import LayerSpec
from .linear import CompressedLinear

_OFFLOADS_BUFFERS = "_offloads_buffers"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` of the model by full name, compressed ones included, that is called where it stands."""
    read = {layer for module in model.modules() for layer in _read_by(module)}
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m not in read}


def _read_by(module: nn.Module) -> tuple[nn.Module, ...]:
    """The layers whose weights a module of torch's hands to one function, past what the layers do themselves."""
    if isinstance(module, nn.MultiheadAttention):
        return (module.out_proj,)
    return (module.linear1, module.linear2) if isinstance(module, nn.TransformerEncoderLayer) else ()


def attach(
    model: nn.Module, specs: Mapping[str, LayerSpec], tensors: Mapping[str, Tensors] | None = None
) -> dict[str, nn.Linear]:
    """Replaces the named linear layers in place and returns the originals, for `detach`.

    Without `tensors` the new layers are empty, on the device of the old ones: the form in which a checkpoint is loaded.
    Raises InputError when a name is not a linear layer of the model, or its shape does not fit its spec.
    """
    layers = linear_layers(model)
    originals = {}
    for name, spec in specs.items():
        if name not in layers:
            raise unknown("linear layer", name, layers, type(model).__name__)
        old = layers[name]
        check_shape(old.out_features, old.in_features, spec, name)
        new = CompressedLinear(
            old.in_features,
            old.out_features,
            spec,
            bias=old.bias is not None,
            device=old.weight.device,
            dtype=old.bias.dtype if old.bias is not None else None,
        )
        if tensors is not None:
            new.load_tensors({k: t.to(old.weight.device) for k, t in tensors[name].items()}, old.bias)
        new.train(old.training)
        model.set_submodule(name, new)
        originals[name] = old
    # diffusers' sequential offloading leaves buffers, and so all codes, on the GPU of a model that has no parameters
    # beside its submodules': an empty one counts, and nothing else sees it
    model.register_parameter(_OFFLOADS_BUFFERS, None)
    if hasattr(type(model), "fuse_lora"):
        model.fuse_lora = partial(fuse_lora, model)  # type: ignore[assignment]
    return originals


def fuse_lora(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """diffusers' `model.fuse_lora`. Raises InputError, with nothing merged, when an adapter is on a compressed layer:
    peft would add floats to its codes."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), CompressedLinear):
            raise InputError(
                f"{name} is compressed, so that no adapter can be merged into its weight; run the adapter unmerged, or "
                "make it a part of the artifact: vdit_quant.join_lora(ARTIFACT, ADAPTER, OUTPUT)"
            )
    kind: Any = type(model)
    return kind.fuse_lora(model, *args, **kwargs)


def attach_settled(
    model: nn.Module, specs: Mapping[str, LayerSpec], tensors: Mapping[str, Tensors]
) -> dict[str, nn.Linear]:
    """`attach` of what methods made of these specs, which may lack a rotation that a method has left out."""
    return attach(model, {name: settled_spec(spec, tensors[name]) for name, spec in specs.items()}, tensors)


def detach(model: nn.Module, originals: Mapping[str, nn.Linear]) -> None:
    """Puts the layers that `attach` returned back; the model is what it was, bit for bit."""
    for name, layer in originals.items():
        model.set_submodule(name, layer)
    if not any(isinstance(module, CompressedLinear) for module in model.modules()):
        model._parameters.pop(_OFFLOADS_BUFFERS, None)
