"""The bit plan: which spec each layer got, what it costs, and how it was found. Found by `allocate`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError, unknown
from .spec import LayerSpec

SOLVERS = ("milp", "joint", "greedy")


@dataclass(frozen=True)
class BitPlan:
    """Which spec each layer gets.

    layers  layer -> short name of its spec
    budget  the budget as it was given
    bytes   stored bytes of these layers;  bits: the same as average bits a weight;  ms: their time, where measured
    error   predicted error, the objective: groups normalised and weighted (see the module)
    errors  group -> sum of its layers' errors, in the unit of the group's metric
    solver  milp, joint (milp, then exchanges on the joint error) or greedy
    gap     bound on (error - optimum) / optimum; None where there is no proof
    """

    layers: dict[str, str]
    budget: str
    bytes: int
    bits: float
    error: float
    errors: dict[str, float] = field(default_factory=dict)
    ms: float | None = None
    solver: str = "milp"
    gap: float | None = None

    def spec_of(self, layer: str) -> LayerSpec:
        """Raises InputError for a layer that the plan does not hold."""
        if layer not in self.layers:
            raise unknown("layer", layer, self.layers, "bit plan")
        return LayerSpec.parse(self.layers[layer])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str = "plans.bits") -> BitPlan:
        """Inverse of `to_dict`. Raises InputError for an unknown or missing key, a wrong type or an unreadable spec."""
        if not isinstance(data, dict):
            raise InputError(f"{where}: expected a table of keys, found {type(data).__name__}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in data:
            if key not in fields:
                raise unknown("key", key, fields, where)
        for key, kinds in _PLAN_TYPES.items():
            needed = fields[key].default is dataclasses.MISSING and fields[key].default_factory is dataclasses.MISSING
            if key not in data and not needed:
                continue
            if key not in data or not isinstance(data[key], kinds) or isinstance(data[key], bool):
                found = repr(data[key]) if key in data else "no such key"
                raise InputError(f"{where}: expected '{key}' as {kinds[0].__name__}, found {found}")
        if data.get("solver", "milp") not in SOLVERS:
            raise unknown("solver", str(data["solver"]), SOLVERS, where)
        for name in dict.fromkeys(map(str, data["layers"].values())):
            try:
                LayerSpec.parse(name)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        return cls(**data)


_PLAN_TYPES: dict[str, tuple[type, ...]] = {
    "layers": (dict,),
    "budget": (str,),
    "bytes": (int,),
    "bits": (float, int),
    "error": (float, int),
    "errors": (dict,),
    "ms": (float, int, type(None)),
    "solver": (str,),
    "gap": (float, int, type(None)),
}
