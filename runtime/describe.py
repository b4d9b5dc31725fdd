"""What an artifact holds and how it will run here, from headers alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..kernels import dispatch
from ..quantize.layer import layer_bytes, layer_ops
from ..quantize.spec import LayerSpec
from .artifact import check_tensors, read_config
from .attach import attach
from .family import find_family
from .fusion import report
from .load import linear_shapes, parse_device
from .source import find_source


def describe_artifact(path: str | Path, device: str | None = None) -> dict[str, Any]:
    """Layers grouped by spec and pattern with true bytes, the kernels each will run on `device`, and the reasons.

    Raises InputError when the folder is not a complete artifact.
    """
    source = find_source(path)
    config = read_config(source.transformer)
    skeleton = source.skeleton()
    shapes = linear_shapes(skeleton)
    check_tensors(config, shapes, source.checkpoint)
    specs = config.resolve(shapes)
    place = parse_device(device)
    attach(skeleton, specs)
    groups: dict[tuple[str, LayerSpec], list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", name, count=1), spec), []).append(name)
    rows = [_row(pattern, spec, [shapes[n] for n in names], place) for (pattern, spec), names in groups.items()]
    elements = sum(shapes[name][0] * shapes[name][1] for name in specs)
    compressed = sum(row["bytes"] for row in rows)
    return {
        "class": source.config.get("_class_name"),
        "version": source.config["quantization_config"]["version"],
        "provenance": config.provenance,
        "plans": config.plans,
        "layers": rows,
        "compressed_bytes": compressed,
        "ratio": compressed / (2 * elements),
        "other_bytes": _file_bytes(source.transformer) - compressed,
        "blocks": report(skeleton, find_family(skeleton).block_names(skeleton)),
        "reasons": reasons(specs.values(), place),
    }


def _row(pattern: str, spec: LayerSpec, shapes: list[tuple[int, int]], device: torch.device) -> dict[str, Any]:
    size = sum(layer_bytes(n, k, spec) for n, k in shapes)
    ops = layer_ops(spec)
    backends = {dispatch.explain(op, device).backend for op in ops}
    return {
        "pattern": pattern,
        "count": len(shapes),
        "spec": spec.name,
        "bits_per_weight": 8 * size / sum(n * k for n, k in shapes),
        "bytes": size,
        "kernels": ", ".join(ops) or "decode + F.linear",
        "backend": "mixed" if {"reference"} < backends else " + ".join(sorted(backends)) or "torch",
    }


def reasons(specs: Any, device: torch.device) -> list[str]:
    """One line for each op that will run its reference on `device`, or a lesser form of its kernel, saying why."""
    ops = sorted({op for spec in specs for op in layer_ops(spec)})
    choices = [dispatch.explain(op, device) for op in ops]
    refused = [f"{c.op}: {c.backend}, because {c.reason}" for c in choices if c.backend == "reference"]
    return refused + [f"{c.op}: {c.backend}, {c.note}" for c in choices if c.note is not None]


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
