"""Loading an artifact: a diffusers pipeline, a bare transformer, or a model of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .artifact import check_tensors, read_config
from .attach import attach, linear_layers
from .checkpoint import Checkpoint
from .linear import CompressedLinear
from .source import Source, find_source, load_pipeline, load_transformer


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on an accelerator; float32 on a CPU, where bfloat16 is slower and less exact."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load(path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """The model behind an artifact: a pipeline when the artifact is a pipeline folder, else the transformer.

    device  default: the GPU when there is one
    dtype   compute dtype; scales stay as stored whatever it is. Default: bfloat16 on a GPU, float32 on a CPU
    Raises InputError when the folder is no artifact, or is damaged, or config and tensors disagree.
    """
    source = find_source(path)
    check_artifact(source)
    device = default_device() if device is None else torch.device(device)
    dtype = default_dtype(device) if dtype is None else dtype
    return load_pipeline(source, dtype, device) if source.is_pipeline else load_transformer(source, dtype, device)


def check_artifact(source: Source) -> None:
    """Raises InputError unless the folder is a complete artifact that this version reads."""
    config = read_config(source.transformer)
    check_tensors(config, linear_shapes(source.skeleton()), source.checkpoint)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear layer by full name."""
    return {name: (m.out_features, m.in_features) for name, m in linear_layers(model).items()}


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Fills `model`, any nn.Module of the artifact's architecture, from a transformer artifact; returns it.

    For models that are not from diffusers. Raises InputError as `load` does.
    """
    folder = Path(path)
    config, checkpoint = read_config(folder), Checkpoint(folder)
    check_tensors(config, linear_shapes(model), checkpoint)
    attach(model, config.resolve(linear_layers(model)))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}
    rest = {}
    for name in checkpoint.files:
        layer, _, key = name.rpartition(".")
        tensor = checkpoint.get(name)
        if layer in layers and key in layers[layer]._buffers:
            layers[layer]._buffers[key] = tensor.to(layers[layer]._buffers[key].device)
        else:
            rest[name] = tensor
    model.load_state_dict(rest, strict=False)
    return model.eval()
