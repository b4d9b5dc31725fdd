"""Putting finished blocks and the tensors that stay as they are together into an artifact folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..quantize.errors import InputError
from ..quantize.layer import layer_layout
from ..runtime.artifact import DTYPES, FOLDED, make_config
from ..runtime.source import Source
from ..runtime.writer import Entry, staged_around, write_json, write_tensors
from .model_source import ModelSource
from .plan import Plan
from .trained_blocks import is_tuned
from .workspace import Workspace


def block_part(number: int) -> str:
    """Name of the workspace part that holds the compressed tensors of block `number`."""
    return f"block-{number:04d}"


def kept_names(source: Source | ModelSource, plan: Plan) -> list[str]:
    """Names of the source's tensors that the artifact holds under the same name: all but the weights of compressed
    layers."""
    replaced = {f"{layer.name}.weight" for layer in plan.compressed}
    return [name for name in source.checkpoint.headers if name not in replaced]


def check_kept(source: Source | ModelSource, plan: Plan) -> None:
    """Reads every tensor that is kept. Raises InputError for NaN in one, or infinity in one of a linear layer."""
    linear = {f"{layer.name}.{part}" for layer in plan.layers for part in ("weight", "bias")}
    for name in kept_names(source, plan):
        tensor = source.checkpoint.get(name)
        if not tensor.is_floating_point():
            continue
        tensor = tensor.float()
        bad = ~torch.isfinite(tensor) if name in linear else tensor.isnan()  # infinity elsewhere: a mask
        if bad.any():
            raise InputError(f"{source.label}: {name}: {int(bad.sum())} of {bad.numel():,} values are NaN or infinite")


def write_artifact(
    source: Source | ModelSource,
    plan: Plan,
    workspace: Workspace,
    provenance: dict[str, Any],
    target: Path,
    overwrite: bool = False,
    plans: dict[str, Any] | None = None,
) -> None:
    """Writes the artifact folder `target`, whole or not at all."""
    if plan.folds:  # what joins the layers later has to know: they read or make other numbers than the model's own
        folded = {name for fold in plan.folds for name in (fold.producer, *fold.consumers)}
        provenance = {**provenance, FOLDED: sorted(folded)}
    config = make_config(plan.specs(), [layer.name for layer in plan.layers], provenance, plans or {})
    entries, origin = _entries(source, plan)
    parts: dict[str, dict[str, torch.Tensor]] = {}

    def get(name: str) -> torch.Tensor:
        part = origin.get(name)
        if part is None:
            return source.checkpoint.get(name).to(entries[name][1])
        if part not in parts:
            parts.clear()
            parts[part] = workspace.load(part)
        return parts[part][name].to(entries[name][1])

    with staged_around(source if isinstance(source, Source) else None, target, overwrite) as inner:
        write_tensors(inner, entries, get)
        write_json(inner / "config.json", {**source.config, "quantization_config": config.to_dict()})


def _entries(source: Source | ModelSource, plan: Plan) -> tuple[dict[str, Entry], dict[str, str]]:
    """Every tensor of the artifact with shape and dtype, and the block part that each changed one is found in."""
    entries: dict[str, Entry] = {}
    origin: dict[str, str] = {}
    # a user's model takes its buffers as they are; one of diffusers is cast to the dtype it is loaded in
    exact = {name for name, _ in source.model.named_buffers()} if isinstance(source, ModelSource) else set()
    fp32 = set(getattr(type(source.skeleton()), "_keep_in_fp32_modules", None) or ())
    for name in kept_names(source, plan):
        shape, dtype = source.checkpoint.headers[name]
        entries[name] = (shape, _kept_dtype(dtype, name in exact or bool(fp32 & set(name.split(".")))))
    for number, (_, layers) in enumerate(plan.units()):
        part = block_part(number)
        names = {layer.name for layer in layers}
        for layer in layers:
            assert layer.spec is not None
            for key, layout in layer_layout(layer.n, layer.k, layer.spec).items():
                entries[f"{layer.name}.{key}"] = (layout.shape, layout.dtype)
                origin[f"{layer.name}.{key}"] = part
            if is_tuned(layer) and f"{layer.name}.bias" in entries:
                origin[f"{layer.name}.bias"] = part
        for producer in {fold.producer for fold in plan.folds if fold.consumers[0] in names}:
            if (bias := f"{producer}.bias") in entries:
                # (b + 1) s - 1 is a number near 0 beside 1: 16 bits would lose what the fold must not
                entries[bias] = (entries[bias][0], torch.float32)
                origin[bias] = part
            if producer not in names:
                origin[f"{producer}.weight"] = part
    return entries, origin


def _kept_dtype(stored: str, keep_fp32: bool) -> torch.dtype:
    """Tensors that are not compressed keep 16-bit types; float32 becomes bfloat16 unless the model needs it."""
    return torch.bfloat16 if stored == "F32" and not keep_fp32 else DTYPES[stored]
