"""The artifact: a diffusers-shaped folder of plain tensors whose config says what each of them is.

`config.json` is the source model's own, plus `quantization_config`:

    quant_method  "vdit_quant"
    version       schema version, "<major>.<minor>"
    specs         spec id (its short name) -> LayerSpec as JSON
    layers        ordered [glob on the full layer name, spec id]; the first match decides, no match: not compressed
    plans         decisions that are executed at run time, by kind
    provenance    recipe, source, seed, tool version: facts only, no date, so equal runs give equal bytes
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quantize.errors import InputError, unknown
from ..quantize.layer import layer_layout
from ..quantize.spec import LayerSpec
from .checkpoint import Checkpoint, read_json
from .complete import strangers
from .schedule import check_plans

QUANT_METHOD = "vdit_quant"
VERSION = (1, 0)
FOLDED = "folded"
"""Key of the provenance: names of layers whose input or output a folded scale has changed."""
KEYS = ("quant_method", "version", "specs", "layers", "plans", "provenance")
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class ArtifactConfig:
    """The `quantization_config` of an artifact."""

    specs: dict[str, LayerSpec]
    layers: tuple[tuple[str, str], ...]
    plans: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def spec_of(self, name: str) -> LayerSpec | None:
        """The spec of the layer with this full name; None: it is not compressed."""
        return next((self.specs[key] for pattern, key in self.layers if fnmatchcase(name, pattern)), None)

    def resolve(self, names: Iterable[str]) -> dict[str, LayerSpec]:
        """The compressed ones among `names`, with their specs. Raises InputError for a rule that selects nothing."""
        names = list(names)
        found = {name: spec for name in names if (spec := self.spec_of(name)) is not None}
        for pattern, key in self.layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(f"artifact: the rule {pattern} -> {key} selects no layer; is this another model?")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "version": ".".join(map(str, VERSION)),
            "specs": {key: spec.to_dict() for key, spec in self.specs.items()},
            "layers": [list(rule) for rule in self.layers],
            "plans": self.plans,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "quantization_config") -> ArtifactConfig:
        """Raises InputError for another method, a newer schema, an unknown key, or a rule with an unknown spec id."""
        if data.get("quant_method") != QUANT_METHOD:
            raise InputError(f"{where}: quant_method is {data.get('quant_method')!r}, expected '{QUANT_METHOD}'")
        check_version(str(data.get("version", "missing")), where)
        for key in data:
            if key not in KEYS:
                raise unknown("key", key, KEYS, where)
        data = {"plans": {}, "provenance": {}, **data}
        for key, kind in (("specs", dict), ("layers", list), ("plans", dict), ("provenance", dict)):
            if not isinstance(data.get(key), kind):
                raise InputError(f"{where}: expected '{key}' as a {kind.__name__}, found {data.get(key)!r}")
        check_plans(data["plans"], f"{where}.plans")
        for rule in data["layers"]:
            if not isinstance(rule, (list, tuple)) or len(rule) != 2:
                raise InputError(f"{where}: 'layers' expected [pattern, spec id] pairs, found {rule!r}")
        specs = {key: LayerSpec.from_dict(value, f"{where}.specs.{key}") for key, value in data["specs"].items()}
        layers = tuple((str(pattern), str(key)) for pattern, key in data["layers"])
        for pattern, key in layers:
            if key not in specs:
                raise unknown("spec id", key, specs, f"{where}, rule {pattern}")
        return cls(specs, layers, dict(data["plans"]), dict(data["provenance"]))


def check_version(version: str, where: str) -> None:
    """Raises InputError unless this version of the schema can be read."""
    match = re.fullmatch(r"(\d+)\.(\d+)", version)
    if match is None:
        raise InputError(f"{where}: version is '{version}', expected <major>.<minor>")
    if (int(match[1]), int(match[2])) > VERSION or int(match[1]) != VERSION[0]:
        readable = f"{VERSION[0]}.0 to {VERSION[0]}.{VERSION[1]}"
        raise InputError(
            f"{where}: written with schema {version}; this vdit-quant reads {readable}. Upgrade vdit-quant."
        )


def make_config(
    specs: Mapping[str, LayerSpec], all_names: Iterable[str], provenance: dict[str, Any], plans: dict[str, Any]
) -> ArtifactConfig:
    """The config whose rules give exactly the layers in `specs` their spec, and no other of `all_names` any.

    Layers that differ only in a block's number share one rule where they share one spec.
    """
    names = list(all_names)
    rules: list[tuple[str, str]] = []
    for name, spec in specs.items():
        if any(fnmatchcase(name, pattern) for pattern, _ in rules):
            continue
        pattern = re.sub(r"\.\d+\.", ".*.", name, count=1)
        alike = [other for other in names if fnmatchcase(other, pattern)]
        shared = all(specs.get(other) == spec for other in alike)
        taken = any(fnmatchcase(other, rule) for other in alike for rule, _ in rules)
        rules.append((pattern if shared and not taken else name, spec.name))
    used = {spec.name: spec for spec in specs.values()}
    config = ArtifactConfig(used, tuple(rules), plans, provenance)
    if config.resolve(names) != dict(specs):
        rules = [(name, spec.name) for name, spec in specs.items()]
        config = ArtifactConfig(used, tuple(rules), plans, provenance)
    return config


def read_config(folder: Path) -> ArtifactConfig:
    """The artifact config in a transformer folder. Raises InputError when the folder is not an artifact."""
    path = folder / "config.json"
    data = read_json(path).get("quantization_config")
    if data is None:
        raise InputError(f"{path}: no quantization_config; this is a plain checkpoint, not a vdit-quant artifact")
    if not isinstance(data, dict):
        raise InputError(f"{path}: quantization_config: expected a JSON object, found {type(data).__name__}")
    return ArtifactConfig.from_dict(data, str(path))


def is_artifact(folder: Path) -> bool:
    """Whether a transformer folder holds an artifact of ours (readable or not)."""
    path = folder / "config.json"
    if not path.exists():
        return False
    found = read_json(path).get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def check_tensors(config: ArtifactConfig, shapes: Mapping[str, tuple[int, int]], checkpoint: Checkpoint) -> None:
    """Raises InputError unless the file holds, for every compressed layer, the tensors its spec says and no others.

    shapes: (N, K) of every linear layer of the model by full name.
    """
    headers = checkpoint.headers
    known = set()
    specs = config.resolve(shapes)
    for name, spec in specs.items():
        for key, layout in layer_layout(*shapes[name], spec).items():
            known.add(f"{name}.{key}")
            found = headers.get(f"{name}.{key}")
            expected = f"{name}.{key} as {layout.dtype} {list(layout.shape)} ({spec.name})"
            if found is None:
                raise _disagreement(checkpoint, expected, "none")
            shape, dtype = found
            if shape != layout.shape or DTYPES.get(dtype) != layout.dtype:
                raise _disagreement(checkpoint, expected, f"{dtype} {list(shape)}")
    for name, (shape, dtype) in headers.items():
        layer, _, key = name.rpartition(".")
        if layer in specs and key != "bias" and name not in known:
            raise _disagreement(checkpoint, f"no {name} ({specs[layer].name})", f"{dtype} {list(shape)}")


def check_strangers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises InputError for a tensor of the file that the model does not have, its layers being compressed already."""
    for name in strangers(model, checkpoint.headers):
        shape, dtype = checkpoint.headers[name]
        raise _disagreement(checkpoint, f"no {name}", f"{dtype} {list(shape)}")


def _disagreement(checkpoint: Checkpoint, expected: str, found: str) -> InputError:
    return InputError(f"{checkpoint.folder}: config and tensors disagree: expected {expected}, found {found}")
