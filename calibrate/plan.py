"""The plan of a calibration: what happens to each linear layer, decided from names and shapes alone."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..quantize.errors import InputError
from ..quantize.layer import check_shape, layer_bytes, layer_layout, settled_spec, weight_layout
from ..quantize.method import resolve_method
from ..quantize.recipe import Recipe, Step
from ..quantize.spec import LayerSpec
from ..runtime.family import Family, Fold, block_of
from ..runtime.load import linear_shapes

NO_BLOCKS = (
    "no list of two or more modules of one class was found, which are a model's blocks, nor a list of a single module "
    "that looks like one: called ...Block, or with layers named as attention and feed-forward"
)


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear layer [n, k]. `spec` None: it keeps its precision, for the given reason."""

    name: str
    role: str
    n: int
    k: int
    block: str | None
    spec: LayerSpec | None
    reason: str
    method: str = ""
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Bytes of the weight at 16 bits."""
        return 2 * self.n * self.k

    @property
    def bytes_after(self) -> int:
        return self.bytes_before if self.spec is None else layer_bytes(self.n, self.k, self.spec)

    def needs(self) -> frozenset[str]:
        """The statistics that this layer's method asks for."""
        if self.spec is None:
            return frozenset()
        method, params = resolve_method(self.method, self.params)
        return method.needs(params) | ({"absmax"} if self.spec.pre_scale else set())

    def full_params(self) -> dict[str, Any]:
        """The method's parameters with its defaults filled in."""
        return resolve_method(self.method, self.params)[1]

    def unused(self) -> frozenset[str]:
        """Parameters of the method that change nothing of this layer."""
        if self.spec is None:
            return frozenset()
        method, params = resolve_method(self.method, self.params)
        return method.unused(self.spec, params)

    @property
    def is_open(self) -> bool:
        """Whether the method decides on a part of the spec when it sees the layer's statistics."""
        if self.spec is None:
            return False
        method, params = resolve_method(self.method, self.params)
        return method.is_open(self.spec, params)

    def settled(self, stored: Container[str]) -> LayerPlan:
        """The plan with the spec that the layer's stored tensors have."""
        if self.spec is None or not self.is_open:
            return self
        return dataclasses.replace(self, spec=settled_spec(self.spec, stored))


@dataclass(frozen=True)
class Plan:
    layers: tuple[LayerPlan, ...]
    family: str
    folds: tuple[Fold, ...] = ()

    @property
    def compressed(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.spec is not None)

    def specs(self) -> dict[str, LayerSpec]:
        return {layer.name: layer.spec for layer in self.layers if layer.spec is not None}

    def units(self) -> list[tuple[str, list[LayerPlan]]]:
        """The compressed layers block by block, in order: the unit of work that a resumed run keeps."""
        out: dict[str, list[LayerPlan]] = {}
        for layer in self.compressed:
            out.setdefault(layer.block or "outside", []).append(layer)
        return list(out.items())


def settle(plan: Plan, stored: Callable[[int], Collection[str]]) -> Plan:
    """The plan with the specs that methods have decided on. stored: number of a unit -> full names of its tensors"""
    settled: dict[str, LayerPlan] = {}
    for number, (_, layers) in enumerate(plan.units()):
        names = stored(number) if any(layer.is_open for layer in layers) else ()
        for layer in layers:
            settled[layer.name] = layer.settled({name.removeprefix(f"{layer.name}.") for name in names})
    return dataclasses.replace(plan, layers=tuple(settled.get(layer.name, layer) for layer in plan.layers))


def make_plan(model: nn.Module, family: Family, recipe: Recipe) -> Plan:
    """The plan of `recipe` on `model` (which may be on the meta device).

    Raises InputError when a layer's shape cannot be held by its spec, when a pattern of `keep` or of a step's targets
    matches nothing, when the recipe selects no layer at all, or one that the model holds under two names.
    """
    shapes, blocks = linear_shapes(model), family.block_names(model)
    roles = family.linears(model)
    _check_patterns("--keep", recipe.keep, list(roles))
    for number, step in enumerate(recipe.steps, 1):
        _check_patterns(f"recipe {recipe.name}, step {number}: target", step.targets, list(roles))
    folds = tuple(fold for fold in family.folds(model) if _folds(fold, roles, recipe))
    foldable = {name for fold in folds for name in fold.consumers}
    layers = tuple(
        _plan_layer(name, role, shapes[name], block_of(name, blocks), recipe, name in foldable)
        for name, role in roles.items()
    )
    if not any(layer.spec is not None for layer in layers):
        raise InputError(
            f"recipe {recipe.name}: selects none of the {len(layers)} linear layers of {type(model).__name__} "
            f"(family {family.name}; roles found: {', '.join(sorted(set(roles.values()))) or 'none'})"
            + ("" if blocks else f"; {NO_BLOCKS}")
        )
    _check_single(model, [layer.name for layer in layers if layer.spec is not None])
    return Plan(layers, family.name, folds)


def check_formats(plan: Plan) -> None:
    """Raises InputError when a layer's format is known to destroy a model that is rounded to it."""
    for layer in plan.compressed:
        if layer.spec is not None and (reason := layer.spec.weight.resolve().refusal):
            raise InputError(f"layer {layer.name} as {layer.spec.name}: {reason}. --i-know does it all the same")


def check_methods(plan: Plan) -> None:
    """Raises InputError for a method that is for formats of which not one of its layers has any."""
    by_method: dict[str, list[LayerSpec]] = {}
    for layer in plan.compressed:
        assert layer.spec is not None
        by_method.setdefault(layer.method, []).append(layer.spec)
    for name, specs in by_method.items():
        own = resolve_method(name, {})[0].formats()
        if own and not any(spec.weight.format in own for spec in specs):
            found = ", ".join(sorted({spec.name for spec in specs}))
            raise InputError(
                f"method {name}: expected layers in {' or '.join(own)}, found {found}; choose --bits or the specs of a "
                f"recipe for it, or another method"
            )


def check_used(plan: Plan, group_size: int | None, full_steps: tuple[int, int], settings: Collection[str] = ()) -> None:
    """Raises InputError for one of these options, or names of parameters that were set, when it would change no
    layer."""
    specs = list(plan.specs().values())
    for name in settings:
        layers = [layer for layer in plan.compressed if name in layer.params]
        if layers and all(name in layer.unused() for layer in layers):
            found = ", ".join(sorted({f"{layer.method} with {layer.spec.name}" for layer in layers if layer.spec}))
            raise InputError(f"--set {name}: changes nothing of {found}, beside the other settings; leave it out")
    if group_size is not None and not any(spec.weight.group_size == group_size for spec in specs):
        names = ", ".join(sorted({spec.name for spec in specs}))
        raise InputError(f"--group-size {group_size}: no layer's weight has groups that can be chosen ({names})")
    if any(full_steps) and not any(spec.activation for spec in specs):
        first, last = full_steps
        raise InputError(f"--full-steps {first},{last}: activations of every layer are in the compute dtype already")


def _check_single(model: nn.Module, names: list[str]) -> None:
    """Raises InputError for a layer that has another name as well, under which it would be stored uncompressed."""
    compressed = {id(model.get_submodule(name)): name for name in names}
    for other, module in model.named_modules(remove_duplicate=False):
        if (name := compressed.get(id(module), other)) != other:
            raise InputError(f"layer {name} is {other}, too; a layer that a model uses twice is left out with --keep")


def not_made(layer: str, method: str, tensors: list[str], spec: LayerSpec) -> InputError:
    """The error for tensors that a layer's spec asks for and its method does not make."""
    return InputError(
        f"layer {layer}: method {method} makes no {', '.join(tensors)}, which the spec {spec.name} asks for; "
        "choose another method or another spec"
    )


def _check_patterns(where: str, patterns: Collection[str], names: list[str]) -> None:
    """Raises InputError for a glob that matches none of the names: a misspelt one would leave layers unprotected."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.5)
            some = ", ".join(dict.fromkeys([*near, *names[:4]]))
            raise InputError(f"{where} '{pattern}' matches no layer; layers are named like {some}, ...")


def _step(name: str, role: str, recipe: Recipe) -> Step | None:
    if any(fnmatchcase(name, pattern) for pattern in recipe.keep):
        return None
    return next((s for s in recipe.steps if s.selects(name, role)), None)


def _folds(fold: Fold, roles: dict[str, str], recipe: Recipe) -> bool:
    """Whether one step of the recipe compresses every consumer of `fold` with an input scale that may be folded."""
    steps = {id(_step(name, roles[name], recipe)): _step(name, roles[name], recipe) for name in fold.consumers}
    step = next(iter(steps.values()))
    if len(steps) > 1 or step is None or LayerSpec.parse(step.spec).pre_scale:
        return False
    params = resolve_method(step.method, step.params)[1]
    return params.get("smooth", "none") != "none" and bool(params.get("fold", False))


def _plan_layer(
    name: str, role: str, shape: tuple[int, int], block: str | None, recipe: Recipe, foldable: bool
) -> LayerPlan:
    n, k = shape
    kept = next((pattern for pattern in recipe.keep if fnmatchcase(name, pattern)), None)
    if kept is not None:
        return LayerPlan(name, role, n, k, block, None, f"kept: --keep {kept}")
    step = _step(name, role, recipe)
    if step is None:
        return LayerPlan(name, role, n, k, block, None, f"kept: no step of the recipe selects role '{role}'")
    method, params = resolve_method(step.method, step.params)
    try:
        spec = method.complete(LayerSpec.parse(step.spec), n, k, params, foldable)
    except InputError as error:
        raise InputError(f"layer {name} [{n}, {k}] with {step.method}: {error}; --keep '{name}' gets past it") from None
    try:
        check_shape(n, k, spec, name)
    except InputError as error:
        raise InputError(f"{error}. Another --group-size, or --keep '{name}', gets past it") from None
    if extra := sorted(layer_layout(n, k, spec).keys() - weight_layout(n, k, spec).keys() - method.adds):
        raise not_made(name, step.method, extra, spec)
    return LayerPlan(name, role, n, k, block, spec, f"role {role}", step.method, dict(step.params))
