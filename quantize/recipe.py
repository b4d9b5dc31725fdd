"""A recipe: ordered steps in TOML that say which layers get which method and which spec.

    description = "int4 weights, int8 activations"

    [[step]]
    kind = "quantize"
    method = "rtn"
    spec = "w4g64-a8tok"
    roles = ["attention", "feed_forward"]     # or: targets = ["transformer_blocks.*.ff.*"]
    [step.params]
    clip = "none"

For each layer the first step that selects it decides; a layer no step selects keeps its precision.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import InputError, unknown
from .method import AUTO, resolve_method, type_name
from .spec import LayerSpec

ROLES = ("attention", "feed_forward", "modulation", "embedder", "output", "other")
KINDS = ("quantize",)
CORE_ROLES = ("attention", "feed_forward")


@dataclass(frozen=True)
class Step:
    """One step. It selects a layer whose role is in `roles` or whose full name matches a glob in `targets`."""

    method: str
    spec: str
    kind: str = "quantize"
    roles: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_core(self) -> bool:
        """Whether it selects attention or feed-forward layers by their role."""
        return not set(CORE_ROLES).isdisjoint(self.roles)

    def selects(self, name: str, role: str) -> bool:
        return role in self.roles or any(fnmatchcase(name, pattern) for pattern in self.targets)


@dataclass(frozen=True)
class Recipe:
    name: str
    steps: tuple[Step, ...]
    description: str = ""
    keep: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "keep": list(self.keep),
            "step": [{**dataclasses.asdict(s), "roles": list(s.roles), "targets": list(s.targets)} for s in self.steps],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> Recipe:
        """Raises InputError for an unknown key, role, method or spec, with the nearest valid name, or a value of the
        wrong type."""
        allowed = ("name", "description", "keep", "step")
        for key in data:
            if key not in allowed:
                raise unknown("key", key, allowed, where)
        if not isinstance(data.get("step"), list) or not data["step"]:
            raise InputError(f"{where}: expected at least one [[step]]")
        for key in ("name", "description"):
            _check_text(data, key, where)
        if not _is_list_of_strings(data.get("keep", [])):
            raise InputError(f"{where}: 'keep' expected a list of strings, found {data['keep']!r}")
        steps = tuple(_step(s, f"{where}, step {i + 1}") for i, s in enumerate(data["step"]))
        return cls(data.get("name", Path(where).stem), steps, data.get("description", ""), tuple(data.get("keep", ())))

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {path}: cannot be read ({error})") from None
        try:
            return cls.from_dict(tomllib.loads(text), str(path))
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"recipe {path}: not valid TOML ({error})") from None

    def with_method(self, method: str) -> Recipe:
        """The same recipe with another method for the attention and feed-forward layers; its parameters are reset.

        A method that needs no statistics replaces every step's, so that the whole run needs no data.
        Raises InputError for an unknown method, or when no step is for these layers by their role.
        """
        found, params = resolve_method(method, {})
        everywhere = not found.needs(params)
        if not everywhere:
            self._check_core(f"--method {method}")
        steps = tuple(
            dataclasses.replace(s, method=method, params={}) if everywhere or s.is_core else s for s in self.steps
        )
        out = dataclasses.replace(self, steps=steps)
        return Recipe.from_dict(out.to_dict(), f"recipe {self.name} with method {method}")

    def with_params(self, settings: tuple[str, ...]) -> Recipe:
        """The same recipe with `key=value` parameters set in the steps for attention and feed-forward layers.

        Raises InputError for a parameter or value that a step's method does not have, or when there is no such step.
        """
        self._check_core(f"--set {' '.join(settings)}")

        def change(step: Step) -> Step:
            defaults = resolve_method(step.method, {})[0].defaults
            changed = dict(parse_setting(text, defaults, step.method) for text in settings)
            return dataclasses.replace(step, params={**step.params, **changed})

        steps = tuple(change(s) if s.is_core else s for s in self.steps)
        out = dataclasses.replace(self, steps=steps)
        return Recipe.from_dict(out.to_dict(), f"recipe {self.name} with --set {' '.join(settings)}")

    def _check_core(self, option: str) -> None:
        if not any(step.is_core for step in self.steps):
            raise InputError(
                f"{option}: changes the steps whose roles hold {' or '.join(CORE_ROLES)}, and recipe {self.name} has "
                "none; write it into the recipe's own steps"
            )

    def without_folds(self) -> Recipe:
        """The same recipe with every step's input scale kept in its own layer."""

        def keep(step: Step) -> Step:
            folds = "fold" in resolve_method(step.method, {})[0].defaults
            return dataclasses.replace(step, params={**step.params, "fold": False}) if folds else step

        return dataclasses.replace(self, steps=tuple(keep(s) for s in self.steps))

    def with_autos(self, means: bool) -> Recipe:
        """The same recipe with a number for every parameter that is `auto`. means: see `Method.autos`"""

        def settle(step: Step) -> Step:
            method, params = resolve_method(step.method, step.params)
            numbers = {key: pair[0 if means else 1] for key, pair in method.autos.items() if params[key] == AUTO}
            return dataclasses.replace(step, params={**step.params, **numbers})

        return dataclasses.replace(self, steps=tuple(map(settle, self.steps)))

    def with_group_size(self, group_size: int | None) -> Recipe:
        """The same recipe with another weight group size in every step whose weight has groups."""

        def regroup(step: Step) -> Step:
            spec = LayerSpec.parse(step.spec)
            if spec.weight.group_size is None:
                return step
            weight = dataclasses.replace(spec.weight, group_size=group_size)
            return dataclasses.replace(step, spec=dataclasses.replace(spec, weight=weight).name)

        return dataclasses.replace(self, steps=tuple(regroup(s) for s in self.steps))

    def with_keep(self, patterns: tuple[str, ...]) -> Recipe:
        return dataclasses.replace(self, keep=self.keep + patterns)


def parse_setting(text: str, defaults: dict[str, Any], method: str) -> tuple[str, Any]:
    """`key=value` as (key, value of the type that the method's default has). Raises InputError when it is not one."""
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set '{text}': expected KEY=VALUE")
    if key not in defaults:
        raise unknown(f"parameter of {method}", key, defaults, "--set")
    default = defaults[key]
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise InputError(f"--set {text}: expected true or false")
        return key, value == "true"
    if value == default == AUTO:
        return key, value
    try:
        return key, (int if default == AUTO else type(default))(value)
    except ValueError:
        raise InputError(f"--set {text}: expected {type_name(default)}, found '{value}'") from None


def shipped() -> list[str]:
    """Names of the recipes that ship with the package: the values of `--bits`."""
    folder = resources.files(__package__) / "recipes"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def load_shipped(bits: str) -> Recipe:
    """The recipe called `bits`, such as w4a8. Raises InputError listing the shipped ones."""
    if bits not in shipped():
        raise unknown("--bits", bits, shipped())
    text = (resources.files(__package__) / "recipes" / f"{bits}.toml").read_text(encoding="utf-8")
    return Recipe.from_dict({"name": bits, **tomllib.loads(text)}, f"recipe {bits}")


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_text(data: dict[str, Any], key: str, where: str) -> None:
    if not isinstance(data.get(key, ""), str):
        raise InputError(f"{where}: '{key}' expected a string, found {data[key]!r}")


def _step(data: Any, where: str) -> Step:
    fields = [f.name for f in dataclasses.fields(Step)]
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a table, found {type(data).__name__}")
    for key in data:
        if key not in fields:
            raise unknown("key", key, fields, where)
    _check_text(data, "kind", where)
    for key in ("method", "spec"):
        if not isinstance(data.get(key), str):
            raise InputError(f"{where}: expected the key '{key}' with a string")
    for key in ("roles", "targets"):
        if not _is_list_of_strings(data.get(key, [])):
            raise InputError(f"{where}: '{key}' expected a list of strings, found {data[key]!r}")
    if not isinstance(data.get("params", {}), dict):
        raise InputError(f"{where}: 'params' expected a table, found {data['params']!r}")
    step = Step(**{**data, "roles": tuple(data.get("roles", ())), "targets": tuple(data.get("targets", ()))})
    if step.kind not in KINDS:
        raise unknown("kind", step.kind, KINDS, where)
    for role in step.roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES, where)
    if not step.roles and not step.targets:
        raise InputError(f"{where}: selects nothing; give 'roles' or 'targets'")
    LayerSpec.parse(step.spec)
    resolve_method(step.method, step.params, where)
    return step
