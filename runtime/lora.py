"""What diffusers' LoRA loaders have to know of compressed layers. Imported while diffusers is, so it imports none."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .linear import CompressedLinear


def teach_shapes(loaders: ModuleType) -> None:
    """Makes FLUX's loader in `loaders`, `diffusers.loaders.lora_pipeline`, measure a compressed layer by its features.

    It measures layers by their weights, finds packed ones too narrow and puts wider ones in their place. A version of
    diffusers that does not is left as it is.
    """
    loader: Any = getattr(loaders, "FluxLoraLoaderMixin", None)
    theirs = getattr(loader, "_calculate_module_shape", None)
    if theirs is None or hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def shape(model: nn.Module, base_module: Any = None, base_weight_param_name: str | None = None) -> Any:
        layer = base_module
        if layer is None and base_weight_param_name is not None:
            layer = model.get_submodule(base_weight_param_name.rpartition(".")[0])
        if isinstance(layer, CompressedLinear):
            return torch.Size((layer.out_features, layer.in_features))
        return theirs(model, base_module, base_weight_param_name)

    loader._calculate_module_shape = staticmethod(shape)
