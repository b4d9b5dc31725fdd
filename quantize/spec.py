"""What one layer is: `LayerSpec`, frozen, hashable, with a JSON form and a derived short name that reads both ways.

A short name lists the parts in the order the data meets them, for example `w4g64-a8tok-s-h128-r32`:

    w<tag>[g<group>]   weight format and group size (no group: one scale per output row)
    a<tag>tok|g<group> activation format, per token or per group; absent: activations stay in the compute dtype
    s                  a per-channel scale is applied to the input
    h<block>[r]        a block Hadamard rotates the input (r: the regular kind, without a constant column)
    r<rank>            a low-rank branch is added to the output
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernels.hadamard import check_kind
from . import formats, registry
from .errors import InputError, unknown
from .format import Format


@dataclass(frozen=True)
class FormatSpec:
    """A number format and its granularity. `group_size` None: one scale per row (per output channel of a weight,
    per token of an activation)."""

    format: str
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.format, str):
            raise InputError(f"format: expected the name of a format, such as int4, found {self.format!r}")
        if self.group_size is not None and not _is_count(self.group_size, 1):
            raise InputError(f"group_size: expected a positive whole number, found {self.group_size!r}")

    def resolve(self) -> Format:
        # a plain dictionary, because this runs at every call of a layer and inside torch.compile
        found = _FORMATS.get(self.format)
        if found is None:
            found = _FORMATS[self.format] = registry.find(formats, self.format, "FORMAT")
        return found


_FORMATS: dict[str, Format] = {}


@dataclass(frozen=True)
class HadamardSpec:
    """A block-diagonal Hadamard rotation of the input, `block_size` channels a block, with stored random signs."""

    block_size: int
    kind: str = "sylvester"

    def __post_init__(self) -> None:
        if not _is_count(self.block_size, 2):
            raise InputError(f"hadamard block_size: expected a whole number from 2, found {self.block_size!r}")
        if not isinstance(self.kind, str):
            raise InputError(f"hadamard kind: expected the name of a kind, such as sylvester, found {self.kind!r}")
        try:
            check_kind(self.block_size, self.kind)
        except ValueError as error:
            raise InputError(str(error)) from None


@dataclass(frozen=True)
class LayerSpec:
    """How one linear layer is stored and multiplied:

    `y = GEMM(Qa(H(x * pre_quant_scale)), Wq) + (x * pre_quant_scale) D^T U^T + b`
    """

    weight: FormatSpec
    activation: FormatSpec | None = None
    pre_scale: bool = False
    hadamard: HadamardSpec | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        if not _is_count(self.rank, 0):
            raise InputError(f"rank: expected a whole number from 0, found {self.rank!r}")
        if not isinstance(self.pre_scale, bool):
            raise InputError(f"pre_scale: expected true or false, found {self.pre_scale!r}")

    @property
    def name(self) -> str:
        """The short name, see the module's docstring."""
        parts = ["w" + self.weight.resolve().tag + _group(self.weight.group_size)]
        if self.activation is not None:
            tag = self.activation.resolve().tag
            parts.append(f"a{tag}{_group(self.activation.group_size) or 'tok'}")
        if self.pre_scale:
            parts.append("s")
        if self.hadamard is not None:
            parts.append(f"h{self.hadamard.block_size}{'r' if self.hadamard.kind == 'regular' else ''}")
        if self.rank:
            parts.append(f"r{self.rank}")
        return "-".join(parts)

    @classmethod
    def parse(cls, name: str) -> LayerSpec:
        """The spec of a short name. Raises InputError for a part it cannot read, naming the part."""
        head, *rest = name.strip().lower().split("-")
        if not head.startswith("w"):
            raise InputError(f"spec '{name}': expected it to begin with the weight, such as w4g64, found '{head}'")
        values: dict[str, Any] = {"weight": _parse_format(head[1:], name)}
        for part in rest:
            read = _parse_part(part, name)
            if read.keys() & values.keys():
                raise InputError(f"spec '{name}': the part '{part}' says again what another part says")
            values.update(read)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; fields at their default are left out."""
        out: dict[str, Any] = {"weight": _strip(self.weight)}
        if self.activation is not None:
            out["activation"] = _strip(self.activation)
        if self.pre_scale:
            out["pre_scale"] = True
        if self.hadamard is not None:
            out["hadamard"] = dataclasses.asdict(self.hadamard)
        if self.rank:
            out["rank"] = self.rank
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "spec") -> LayerSpec:
        """Inverse of `to_dict`. Raises InputError, naming the key, for an unknown or a missing one and for a value that
        cannot be."""
        values = dict(_known(cls, data, where))
        for key, kind in (("weight", FormatSpec), ("activation", FormatSpec), ("hadamard", HadamardSpec)):
            if key == "weight" or values.get(key) is not None:
                values[key] = _build(kind, _known(kind, values[key], f"{where}.{key}"), f"{where}.{key}")
        spec: LayerSpec = _build(cls, values, where)
        for key in ("weight", "activation"):
            part: FormatSpec | None = getattr(spec, key)
            if part is not None:
                _build(part.resolve, {}, f"{where}.{key}")
        return spec


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _build(kind: Callable[..., Any], values: dict[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _group(size: int | None) -> str:
    return f"g{size}" if size else ""


def _strip(spec: FormatSpec) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(spec).items() if value is not None}


def _known(kind: type, data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a table of keys, found {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise unknown("key", str(key), fields, where)
    for name, field in fields.items():
        if name not in data and field.default is dataclasses.MISSING:
            raise InputError(f"{where}: the key '{name}' is missing")
    return data


def _parse_format(text: str, name: str, suffix: str = "") -> FormatSpec:
    by_tag = {registry.find(formats, f, "FORMAT").tag: f for f in registry.names(formats)}
    match = re.fullmatch(
        rf"({'|'.join(sorted(map(re.escape, by_tag), key=len, reverse=True))})(?:g(\d+))?{suffix}", text
    )
    if match is None:
        raise unknown("format", text, by_tag, f"spec '{name}'")
    return FormatSpec(by_tag[match[1]], int(match[2]) if match[2] else None)


def _parse_part(part: str, name: str) -> dict[str, Any]:
    if part.startswith("a"):
        return {"activation": _parse_format(part[1:], name, "(?:tok)?")}
    if part == "s":
        return {"pre_scale": True}
    if match := re.fullmatch(r"h(\d+)(r?)", part):
        return {"hadamard": HadamardSpec(int(match[1]), "regular" if match[2] else "sylvester")}
    if match := re.fullmatch(r"r(\d+)", part):
        return {"rank": int(match[1])}
    raise InputError(f"spec '{name}': cannot read the part '{part}' (known: a8tok, s, h<block>, r<rank>)")
