"""What an artifact holds and how it will run here, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..kernels import dispatch
from ..quantize.layer import layer_bytes, layer_ops
from ..quantize.spec import LayerSpec
from .artifact import check_strangers, check_tensors, read_config
from .attach import attach
from .family import find_family
from .fused_ops import Steps, fused_ops
from .fusion import report
from .load import linear_shapes, parse_device
from .source import find_source, known_class
from .stand_in import stand_in


def describe_artifact(path: str | Path, device: str | None = None, component: str | None = None) -> dict[str, Any]:
    """Layers grouped by spec and pattern with true bytes, the kernels each will run on `device`, and the reasons.

    A model whose class is not here is described by its files alone, each layer by itself. `component` as in
    `find_source`.
    Raises InputError when the folder is not a complete artifact.
    """
    source = find_source(path, component)
    config = read_config(source.transformer)
    known = known_class(source.config) is not None
    skeleton = source.skeleton() if known else stand_in(config, source.checkpoint)
    shapes = linear_shapes(skeleton)
    check_tensors(config, shapes, source.checkpoint)
    specs = config.resolve(shapes)
    place = parse_device(device)
    attach(skeleton, specs)
    if known:
        check_strangers(skeleton, source.checkpoint)
    blocks = report(skeleton, find_family(skeleton).block_names(skeleton)) if known else {}
    fused = fused_ops(skeleton) if known and place.type != "cpu" else {}
    groups: dict[tuple[str, LayerSpec, Steps | None], list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", name, count=1), spec, fused.get(name)), []).append(name)
    rows, choices = [], []
    for (pattern, spec, steps), names in groups.items():
        sizes = [shapes[name] for name in names]
        here = _choices(spec, steps, sizes, place)
        rows.append({"pattern": pattern, **_row(spec, steps, sizes, here)})
        choices += here
    elements = sum(shapes[name][0] * shapes[name][1] for name in specs)
    compressed = sum(row["bytes"] for row in rows)
    return {
        "class": source.config.get("_class_name"),
        "known": known,
        "component": source.component if source.is_pipeline else None,
        "components": source.components,
        "version": source.config["quantization_config"]["version"],
        "provenance": config.provenance,
        "plans": config.plans,
        "layers": rows,
        "compressed_bytes": compressed,
        "ratio": compressed / (2 * elements),
        "other_bytes": _file_bytes(source.transformer) - compressed,
        "blocks": blocks,
        "reasons": reasons(choices),
    }


def _choices(
    spec: LayerSpec, steps: Steps | None, shapes: list[tuple[int, int]], device: torch.device
) -> list[dispatch.Choice]:
    """What would run each op of layers [n, k] of one spec. `steps`: those of their stage, None where they run alone."""
    ops = layer_ops(spec) if steps is None else [op for step in steps for op in step]
    facts: dict[str, Any] = {} if spec.weight.group_size is None else {"group": spec.weight.group_size}
    facts |= {} if spec.hadamard is None else {"block_size": spec.hadamard.block_size}
    return [dispatch.explain(op, device, n=n, k=k, **facts) for op in ops for n, k in dict.fromkeys(shapes)]


def _row(
    spec: LayerSpec, steps: Steps | None, shapes: list[tuple[int, int]], choices: list[dispatch.Choice]
) -> dict[str, Any]:
    size = sum(layer_bytes(n, k, spec) for n, k in shapes)
    backends = {choice.backend for choice in choices}
    alone = ", ".join(layer_ops(spec)) or "decode + F.linear"
    return {
        "count": len(shapes),
        "spec": spec.name,
        "bits_per_weight": 8 * size / sum(n * k for n, k in shapes),
        "bytes": size,
        "kernels": alone if steps is None else "fused: " + ", ".join(map(" | ".join, steps)),
        "backend": "mixed" if {"reference"} < backends else " + ".join(sorted(backends)) or "torch",
    }


def reasons(found: Iterable[dispatch.Choice]) -> list[str]:
    """One line for each op that will run its reference, or a lesser form of its kernel, saying why."""
    choices = sorted(set(found), key=lambda choice: (choice.op, choice.reason))
    refused = [f"{c.op}: {c.backend}, because {c.reason}" for c in choices if c.backend == "reference"]
    return refused + [f"{c.op}: {c.backend}, {c.note}" for c in choices if c.note is not None]


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
