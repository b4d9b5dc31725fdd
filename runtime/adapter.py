"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) joined to an artifact, which makes another artifact.

A compressed layer gets the adapter as ranks of its low-rank branch (`quantize.low_rank.join_adapter`), so nothing is
quantised again; the weight of a layer that is not compressed gets `scale B A` added.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..quantize.errors import InputError, reason_of
from ..quantize.format import Tensors
from ..quantize.layer import check_shape, layer_layout
from ..quantize.low_rank import join_adapter
from ..quantize.spec import LayerSpec
from .artifact import DTYPES, FOLDED, check_tensors, make_config, read_config
from .checkpoint import read_header, read_json, refuse_pickle
from .load import linear_shapes
from .source import Source, find_source
from .writer import Entry, check_target, staged_around, write_json, write_tensors

logger = logging.getLogger("vdit_quant")

DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".lora_down.weight")
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", ".lora_up.weight")
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
TEXT_ENCODERS = ("text_encoder", "lora_te")
METADATA = "lora_adapter_metadata"  # where diffusers writes ranks and alphas
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # where peft does: a file beside


@dataclass(frozen=True)
class Adapter:
    """`y += scale x down^T up^T` of one layer: down float [r, K], up float [N, r]."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.down)


def join_lora(
    artifact: str | Path,
    adapter: str | Path,
    output: str | Path,
    scale: float = 1.0,
    overwrite: bool = False,
    component: str | None = None,
) -> dict[str, int]:
    """Writes `artifact` with an adapter joined to it as the artifact `output`; returns the rank that each layer got.

    adapter  a safetensors file for this model, in diffusers' or peft's layout, or in another that diffusers converts
    scale    of the adapter, times its own alpha / r
    component  the denoiser that it is for, where a pipeline has two: see `find_source`
    Raises InputError, with nothing left half written, when the adapter does not fit the model.
    """
    source, target = find_source(artifact, component), Path(output)
    config = read_config(source.transformer)
    shapes = linear_shapes(source.skeleton())
    check_tensors(config, shapes, source.checkpoint)
    adapters = read_adapter(Path(adapter), shapes, str(source.config.get("_class_name")), scale)
    _refuse_folded(adapters, config.provenance.get(FOLDED) or (), adapter)
    old = config.resolve(shapes)
    new = {name: _joined(spec, adapters.get(name), shapes[name], name) for name, spec in old.items()}
    check_target(target, source, overwrite)
    joined = [*config.provenance.get("adapters", []), {"file": Path(adapter).name, "scale": scale}]
    provenance = {**config.provenance, "adapters": joined}
    entries, writer = _entries(source, new, adapters, shapes), _Writer(source, old, adapters)
    with staged_around(source, target, overwrite) as inner:
        write_tensors(inner, entries, writer.get)
        made = make_config(new, shapes, provenance, config.plans)
        write_json(inner / "config.json", {**source.config, "quantization_config": made.to_dict()})
    return {name: found.rank for name, found in adapters.items()}


def read_adapter(
    path: Path, shapes: Mapping[str, tuple[int, int]], model_class: str, scale: float = 1.0
) -> dict[str, Adapter]:
    """The adapters in a file by the full name of their layer. Those of text encoders are left out, which is logged.

    shapes  (N, K) of every linear layer of the model by full name
    Raises InputError for a file that is none, and for one that names another layer, does not fit, is not finite, or is
    more than a low-rank product (DoRA, biases, convolutions).
    """
    if not math.isfinite(scale):
        raise InputError(f"{path}: expected a finite scale, found {scale:g}")
    tensors, settings = _read(path)
    if settings.get("use_dora"):
        raise InputError(f"{path}: a DoRA adapter, which is more than a low-rank product, so it cannot be joined")
    if not any(name.endswith(DOWN[:2]) for name in tensors):
        tensors = _convert(tensors, model_class, path)
    others = [name for name in tensors if name.startswith(TEXT_ENCODERS)]
    if others:
        logger.warning("%s: %d tensors of text encoders are left out, such as %s", path, len(others), others[0])
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(TEXT_ENCODERS):
            continue
        layer, part = _part(name)
        if part is None:
            raise InputError(f"{path}: {name}: not part of a low-rank product, so it cannot be joined")
        if bad := int((~tensor.float().isfinite()).sum()):
            raise InputError(f"{path}: {name}: {bad} of {tensor.numel():,} values are NaN or infinite")
        found.setdefault(layer, {})[part] = tensor
    adapters = {}
    for layer, parts in found.items():
        if layer not in shapes:
            near = difflib.get_close_matches(layer, shapes, n=1, cutoff=0.0)
            raise InputError(f"{path}: {layer}: the model has no such linear layer; the nearest is {near[0]}")
        down, up = parts.get("down"), parts.get("up")
        n, k = shapes[layer]
        if down is None or up is None or down.shape[1:] != (k,) or up.shape != (n, len(down)) or not len(down):
            shown = " and ".join("none" if t is None else str(list(t.shape)) for t in (down, up))
            raise InputError(f"{path}: {layer}: expected factors [r, {k}] and [{n}, r], found {shown}")
        own = _own_scale(layer, len(down), parts.get("alpha"), settings)
        if not abs(scale * own) <= torch.finfo(torch.float32).max:  # NaN compares as false
            raise InputError(f"{path}: {layer}: expected a finite scale, found {scale:g}, times its own {own:g}")
        adapters[layer] = Adapter(down, up, scale * own)
    if not adapters:
        raise InputError(f"{path}: no tensor of a LoRA adapter, such as LAYER{DOWN[0]}")
    return adapters


def _refuse_folded(adapters: Collection[str], folded: Collection[str], path: str | Path) -> None:
    """Raises InputError for an adapter of a layer that reads, or makes, what a folded scale has changed: it was trained
    on the model's own numbers, and the artifact does not hold the scale."""
    if layer := next((name for name in adapters if name in folded), None):
        raise InputError(
            f"{path}: {layer}: the artifact has a scale folded into this layer, so no adapter can join it; "
            "expected an artifact calibrated with --set fold=false"
        )


def _own_scale(layer: str, rank: int, alpha: Tensor | None, settings: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) where it was trained so (Kalajdzievski 2023, arXiv 2312.03732)."""
    value = settings.get("lora_alpha", rank) if alpha is None else float(alpha)
    for key, own in (settings.get("alpha_pattern") or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", layer)  # as peft reads it: the end of a name, or a regular expression
        except re.error as error:
            raise InputError(f"{layer}: alpha_pattern: expected regular expressions, found '{key}' ({error})") from None
        if found:
            value = own
            break
    return float(value) / (rank**0.5 if settings.get("use_rslora") else rank)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the settings of the denoiser's adapter: in its metadata, or where peft puts them."""
    refuse_pickle(path)
    read_header(path)  # its errors tell a folder, a file without permission and a truncated one apart
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        settings = json.loads(metadata.get(METADATA, "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from None
    beside = path.with_name(PEFT_CONFIG)
    if METADATA not in metadata and path.name == PEFT_WEIGHTS and beside.exists():
        settings = read_json(beside)
    return tensors, {_bare(key): value for key, value in settings.items()}


def _bare(name: str) -> str:
    """Without what a wrapper around the model put in front."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _part(name: str) -> tuple[str, str | None]:
    """The layer that a tensor belongs to, and whether it is its "down", "up" or "alpha"."""
    for part, endings in (("down", DOWN), ("up", UP), ("alpha", (".alpha",))):
        for ending in endings:
            if name.endswith(ending):
                return _bare(name.removesuffix(ending)), part
    return name, None


def _convert(tensors: dict[str, Tensor], model_class: str, path: Path) -> dict[str, Tensor]:
    """Another layout as diffusers' own, by diffusers; as it is where diffusers has no converter for this model."""
    from diffusers.loaders import lora_pipeline

    kind = model_class.split("Transformer")[0]
    mixin: Any = getattr(lora_pipeline, f"{kind}LoraLoaderMixin", None)
    if mixin is None:
        return tensors
    # where a converter can hand the alphas out, it drops them unless it is asked to
    apart = "return_alphas" in inspect.signature(mixin.lora_state_dict).parameters
    try:
        if not apart:
            return dict(mixin.lora_state_dict(dict(tensors)))
        converted, alphas = mixin.lora_state_dict(dict(tensors), return_alphas=True)
        return {**converted, **(alphas or {})}
    except Exception as error:  # whatever a converter makes of names it does not know
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise InputError(f"{path}: diffusers cannot read this adapter for {model_class} ({reason})") from error


def _joined(spec: LayerSpec, adapter: Adapter | None, shape: tuple[int, int], layer: str) -> LayerSpec:
    if adapter is None:
        return spec
    joined = dataclasses.replace(spec, rank=spec.rank + adapter.rank)
    check_shape(*shape, joined, layer)
    return joined


def _entries(
    source: Source,
    specs: Mapping[str, LayerSpec],
    adapters: Mapping[str, Adapter],
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, Entry]:
    """Every tensor of the new artifact with shape and dtype."""
    entries = {name: (shape, DTYPES[dtype]) for name, (shape, dtype) in source.checkpoint.headers.items()}
    for layer in adapters:
        if layer in specs:
            layout = layer_layout(*shapes[layer], specs[layer])
            entries.update({f"{layer}.{key}": (t.shape, t.dtype) for key, t in layout.items()})
    return entries


class _Writer:
    """Reads the tensors of an artifact, with those of adapted layers as they become."""

    def __init__(self, source: Source, specs: Mapping[str, LayerSpec], adapters: Mapping[str, Adapter]) -> None:
        self.checkpoint, self.specs, self.adapters = source.checkpoint, specs, adapters
        self.layer, self.tensors = "", Tensors()

    def get(self, name: str) -> Tensor:
        layer, _, key = name.rpartition(".")
        adapter = self.adapters.get(layer)
        if adapter is None or key == "bias":
            return self.checkpoint.get(name)
        if layer not in self.specs:
            weight = self.checkpoint.get(name)
            return (weight.float() + adapter.scale * adapter.up.float() @ adapter.down.float()).to(weight.dtype)
        if layer != self.layer:
            held = [n for n in self.checkpoint.files if n.rpartition(".")[0] == layer and not n.endswith(".bias")]
            stored = {n.rpartition(".")[2]: self.checkpoint.get(n) for n in held}
            joined = join_adapter(stored, self.specs[layer], adapter.down, adapter.up, adapter.scale)
            self.layer, self.tensors = layer, joined[0]
        return self.tensors[key]
