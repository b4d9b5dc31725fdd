"""Which parameters of a method made of the steps of `compose` change nothing of a layer, so that nobody sets them in
vain."""

from __future__ import annotations

from typing import Any

from .format import ScalarFormat
from .minifloat import Minifloat
from .spec import LayerSpec
from .vector import VectorFormat


def unused_choices(spec: LayerSpec, params: dict[str, Any]) -> frozenset[str]:
    """Names among `params`, all of a method's, that do not matter for a layer of this completed spec."""
    fmt, found = spec.weight.resolve(), set()
    if not isinstance(fmt, ScalarFormat):
        found |= {"clip", "element", "sweeps", "unbiased"}
    if not isinstance(fmt, ScalarFormat | VectorFormat):
        found |= {"rounding", "damp", "act_order"}
    if not (isinstance(fmt, Minifloat) and len(fmt.elements) > 1):
        found.add("element")
    # a row is rescaled by its scale; the number of columns, one group here, does not matter
    if "weight_scale" not in fmt.layout(1, spec.weight.group_size or 1, spec.weight):
        found.add("unbiased")
    if params.get("rounding") == "rtn":
        found |= {"damp", "act_order", "sweeps"}
    if params.get("smooth", "none") == "none" and not spec.pre_scale:
        found |= {"alpha", "aggregate", "fold"}
    if params.get("smooth") == "search":
        found.add("alpha")
    if spec.hadamard is None:
        found |= {"kind", "rotate"}
    if not spec.rank:
        found |= {"branch", "rounds"}
    if spec.activation is None:
        found.add("noise")
    return frozenset(found & set(params))
