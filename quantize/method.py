"""What a compression method is: it chooses the numbers of one layer; nothing at run time knows its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from . import methods, registry
from .errors import InputError, unknown
from .format import Tensors
from .spec import LayerSpec
from .stats import LayerStats

AUTO = "auto"
ADDITIONS = ("pre_quant_scale", "hadamard_signs", "proj_down", "proj_up")


@dataclass(frozen=True)
class FloatLayer:
    """A linear layer before compression: weight float32 [N, K], bias float [N] or None."""

    name: str
    weight: Tensor
    bias: Tensor | None = None


class Method:
    """A new method is one file in `methods/` that exports `METHOD`.

    `defaults` lists its parameters; a recipe may set those and no others. In every call `params` holds them all.
    `choices` lists, for a parameter that is one of a few words, these words; `bounds`, for one that is a number, the
    least and the largest it may be. Names there that are no parameter are ignored.
    `autos` gives, for a parameter that is a whole number or AUTO, the two numbers that AUTO may stand for: where the
    run has the means for it, and where not. Planning decides, so that an artifact's record holds a number.
    `adds` lists the tensors, beside the weight format's, that it can make where a spec asks for them.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}
    autos: ClassVar[Mapping[str, tuple[int, int]]] = {}
    adds: ClassVar[frozenset[str]] = frozenset(ADDITIONS)
    by_rows: ClassVar[bool] = False  # without a scale and a rank, no row depends on others but for a searched rotation

    def needs(self, params: dict[str, Any]) -> frozenset[str]:
        """The statistics that calibration must record for it (names of `stats.KINDS`); empty: it runs without data."""
        return frozenset()

    def complete(self, spec: LayerSpec, n: int, k: int, params: dict[str, Any], foldable: bool = False) -> LayerSpec:
        """The spec of a layer [n, k] after this method added what it works with (a scale, a rotation, a rank).

        foldable: an input scale of this layer can be folded into the layer before it, so it need not be stored.
        """
        return spec

    def formats(self) -> tuple[str, ...]:
        """The weight formats that this method is for; none: any. A plan in which not one of its layers has one of them
        is refused, because it would be another method's work under this one's name."""
        return ()

    def is_open(self, spec: LayerSpec, params: dict[str, Any]) -> bool:
        """Whether `compress` decides on a part of this completed spec, as `settled_spec` then reads it."""
        return False

    def unused(self, spec: LayerSpec, params: dict[str, Any]) -> frozenset[str]:
        """Parameters that change nothing of a layer of this completed spec, the others being what they are."""
        return frozenset()

    def block_steps(self, params: dict[str, Any]) -> int:
        """Steps that a block is trained for once its layers are compressed; 0: it is not."""
        return 0

    def compress(self, layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, **params: Any) -> Tensors:
        """The tensors of `layer_layout(n, k, spec)`. Deterministic: the same input gives the same bits."""
        raise NotImplementedError


def resolve_method(name: str, params: dict[str, Any], where: str = "") -> tuple[Method, dict[str, Any]]:
    """The method called `name` and its parameters with defaults filled in.

    Raises InputError for an unknown method or parameter, a value of another type than the default's, a word that is
    none of the parameter's choices, or a number out of its bounds.
    """
    method: Method = registry.find(methods, name, "METHOD")
    for key, value in params.items():
        if key not in method.defaults:
            raise unknown(f"parameter of {name}", key, method.defaults, where)
        default = method.defaults[key]
        if default is not None and not _same_type(value, default):
            expected, found = type_name(default), type(value).__name__
            raise InputError(f"{where or name}: parameter '{key}' expected {expected}, found {found} ({value!r})")
        if value not in method.choices.get(key, (value,)):
            raise unknown(f"value of {key}", value, method.choices[key], where or name)
        _check_number(key, value, method.bounds.get(key, (-math.inf, math.inf)), where or name)
    return method, {**method.defaults, **params}


def type_name(default: Any) -> str:
    """What a parameter with this default may be, in words."""
    return f"int or {AUTO}" if default == AUTO else type(default).__name__


def _check_number(key: str, value: Any, bounds: tuple[float, float], where: str) -> None:
    """Raises InputError for a number that is none, is infinite, or is out of `bounds`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    least, most = bounds
    if not (math.isfinite(value) and least <= value <= most):
        upper = "" if most == math.inf else f", at most {most:g}"
        lower = "" if least == -math.inf else f", at least {least:g}"
        raise InputError(f"{where}: parameter '{key}' expected a finite number{lower}{upper}, found {value:g}")


def _same_type(value: Any, default: Any) -> bool:
    if default == AUTO:
        return value == AUTO or type(value) is int
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)
