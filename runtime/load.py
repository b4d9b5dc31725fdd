"""Loading an artifact: a diffusers pipeline, a bare transformer, or a model of your own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quantize.errors import InputError, reason_of, unknown
from ..quantize.spec import LayerSpec
from .artifact import check_strangers, check_tensors, is_artifact, read_config
from .attach import attach, linear_layers
from .checkpoint import Checkpoint
from .fusion import fuse
from .graphs import replay_graphs
from .linear import CompressedLinear
from .schedule import apply_plans
from .source import Source, find_source, load_pipeline, load_transformer


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, which need not be here; None: the GPU when there is one. Raises InputError."""
    try:
        return default_device() if device is None else torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device '{device}'; expected one like cpu, cuda or cuda:1") from None


def pick_device(device: str | torch.device | None) -> torch.device:
    """As `parse_device`; raises InputError also when that device cannot be used here."""
    place = parse_device(device)
    if place.type == "meta":
        raise InputError("device 'meta' cannot be used here: it holds shapes and no numbers")
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device '{place}' cannot be used here: {reason_of(error)}") from None
    return place


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on an accelerator; float32 on a CPU, where bfloat16 is slower and less exact."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def pick_dtype(name: torch.dtype | str | None, device: torch.device | str) -> torch.dtype:
    """The compute dtype of that name, the device's default for None. Raises InputError for another one."""
    if name is None:
        return default_dtype(device)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(name).removeprefix("torch.")
    if name not in known:
        raise unknown("dtype", name, known)
    return known[name]


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    cuda_graphs: bool | None = None,
) -> Any:
    """The model behind an artifact: a pipeline when the artifact is a pipeline folder, else the transformer.

    device  default: the GPU when there is one
    dtype   compute dtype; scales stay as stored whatever it is. Default: bfloat16 on a GPU, float32 on a CPU
    cuda_graphs  capture the denoiser's forward once for each shape and replay it (runtime/graphs.py): without it
                 starting the kernels takes longer than running them. Default: on a GPU, yes
    Raises InputError when the folder is no artifact, or is damaged, or config and tensors disagree.
    """
    source = find_source(path)
    compressed = [name for name in source.components if is_artifact(source.root / name)] or [source.component]
    for name in compressed:
        check_artifact(replace(source, component=name))
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    model: Any = load_pipeline(source, dtype, device) if source.is_pipeline else load_transformer(source, dtype, device)
    if device.type == "cuda" if cuda_graphs is None else cuda_graphs:
        for denoiser in [getattr(model, name) for name in compressed] if source.is_pipeline else [model]:
            replay_graphs(denoiser)
    return model


def check_artifact(source: Source) -> None:
    """Raises InputError unless the folder is a complete artifact that this version reads."""
    config, skeleton = read_config(source.transformer), source.skeleton()
    check_tensors(config, linear_shapes(skeleton), source.checkpoint)
    attach(skeleton, config.resolve(linear_layers(skeleton)))
    check_strangers(skeleton, source.checkpoint)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear layer by full name."""
    return {name: (m.out_features, m.in_features) for name, m in linear_layers(model).items()}


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Fills `model`, any nn.Module of the artifact's architecture, from a transformer artifact; returns it.

    For models that are not from diffusers. Raises InputError as `load` does, and for a model on the meta device.
    """
    folder = Path(path)
    if name := next((n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta), None):
        raise InputError(
            f"{name} of the model is on the meta device; move it first, as by model.to_empty(device='cpu')"
        )
    config, checkpoint = read_config(folder), Checkpoint(folder)
    check_tensors(config, linear_shapes(model), checkpoint)
    specs = config.resolve(linear_layers(model))
    _check_rest(model, specs, checkpoint)
    attach(model, specs)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}
    rest = {}
    for name in checkpoint.files:
        layer, _, key = name.rpartition(".")
        tensor = checkpoint.get(name)
        if layer in layers and key in layers[layer].tensors():
            layers[layer]._buffers[key] = tensor.to(layers[layer].tensors()[key].device)
        else:
            rest[name] = tensor
    model.load_state_dict(rest, strict=False)
    apply_plans(model, config.plans)
    return fuse(model.eval())


def _check_rest(model: nn.Module, specs: Mapping[str, LayerSpec], checkpoint: Checkpoint) -> None:
    """Raises InputError unless the file holds exactly the tensors of the model that are not compressed."""

    def is_plain(name: str) -> bool:
        layer, _, key = name.rpartition(".")
        return layer not in specs or key == "bias"

    expected = {name: list(t.shape) for name, t in model.state_dict().items() if is_plain(name)}
    found = {name: list(shape) for name, (shape, _) in checkpoint.headers.items() if is_plain(name)}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{checkpoint.folder}: {name}: the model expects {expected.get(name, 'no such tensor')}, "
                f"the file holds {found.get(name, 'no such tensor')}"
            )
