"""What samples are asked to show: conditions from a file, or random ones where the family knows how to draw them.

A conditions file is safetensors. For every call argument of the denoiser but the latents and the timestep it holds

    NAME            [count, ...]       one condition a row
    uncond.NAME     [1 or count, ...]  the same for the unguided branch; an argument without one is given its NAME
    latents_shape   int64 [dimensions] shape of one latent, for models whose configuration does not say it
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..quantize.errors import InputError, unknown
from ..runtime.family import Family
from ..runtime.step import TIMESTEP_NAMES, signature_of

UNGUIDED = "uncond."
LATENTS_SHAPE = "latents_shape"
LABELS = "class_labels"


@dataclass(frozen=True)
class Conditions:
    """Call arguments of the denoiser, [samples, ...] each. `unguided` None: there is no unguided branch."""

    guided: dict[str, Tensor]
    unguided: dict[str, Tensor] | None
    latent_shape: tuple[int, ...]


def read_conditions(path: str | Path, model: nn.Module, family: Family, count: int, seed: int) -> Conditions:
    """`count` conditions of the file in an order drawn from `seed`, each used once before any is used again.

    Raises InputError, naming file and tensor, for whatever the model could not be called with.
    """
    tensors = _load(path)
    shape = _latent_shape(path, tensors.pop(LATENTS_SHAPE, None), model, family)
    free = {n.removeprefix(UNGUIDED): t for n, t in tensors.items() if n.startswith(UNGUIDED)}
    guided = {name: t for name, t in tensors.items() if not name.startswith(UNGUIDED)}
    check_names(path, guided, model, family)
    held = _check_shapes(path, guided, family.condition_shapes(model))
    check_shared(path, guided, guided, family)
    check_unguided(path, free, guided)
    check_labels(path, tensors, model)
    chosen = condition_order(held, count, seed)
    guided = {name: t[chosen] for name, t in guided.items()}
    if not free:
        return Conditions(guided, _unguided(model, family, guided), shape)
    unguided = {n: t.expand(count, *t.shape[1:]) if len(t) == 1 else t[chosen] for n, t in free.items()}
    return Conditions(guided, {**guided, **unguided}, shape)


def condition_order(held: int, count: int, seed: int) -> Tensor:
    """int64 [count]: which of the `held` conditions each sample is given."""
    return torch.randperm(held, generator=torch.Generator().manual_seed(seed))[torch.arange(count) % held]


def random_conditions(model: nn.Module, family: Family, count: int, seed: int) -> Conditions:
    """The family's own conditions. Raises InputError when it knows none."""
    try:
        guided = family.conditions(model, count, torch.Generator().manual_seed(seed))
        return Conditions(guided, family.unconditional(model, guided), family.latent_shape(model))
    except NotImplementedError:
        raise InputError(
            f"{type(model).__name__}: the family '{family.name}' does not know how to call it without data; give "
            "--conditions FILE (safetensors) or pass data= from Python; calibrate and compare take a pipeline, too"
        ) from None


def fingerprint(path: str | Path) -> str:
    """A name for the file's contents. Raises InputError when it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{path}: conditions cannot be read ({error.strerror})") from None


def given_latent_shape(path: str | Path) -> tuple[int, ...] | None:
    """The shape of one latent that a conditions file holds; None when it leaves it to the model's configuration.

    Raises InputError when the file cannot be read, or does not hold a list of sizes.
    """
    given = _load(path).get(LATENTS_SHAPE)
    return None if given is None else _sizes(path, given)


def _load(path: str | Path) -> dict[str, Tensor]:
    fingerprint(path)  # its error is clearer than the loader's
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: expected conditions as safetensors ({error})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds NaN or infinity")
    return tensors


def _latent_shape(path: str | Path, given: Tensor | None, model: nn.Module, family: Family) -> tuple[int, ...]:
    if given is None:
        try:
            return family.latent_shape(model)
        except NotImplementedError:
            raise InputError(
                f"{path}: no {LATENTS_SHAPE} (int64, such as [channels, frames, height, width]), and the configuration "
                f"of {type(model).__name__} does not say it"
            ) from None
    return _sizes(path, given)


def _sizes(path: str | Path, given: Tensor) -> tuple[int, ...]:
    if given.dim() != 1 or given.is_floating_point() or not len(given) or int(given.min()) < 1:
        raise InputError(f"{path}: {LATENTS_SHAPE}: expected a list of sizes, found {given.dtype} {given.tolist()}")
    return tuple(given.tolist())


def check_names(path: str | Path, guided: dict[str, Tensor], model: nn.Module, family: Family) -> None:
    """Raises InputError for a condition that the model does not take, or for one missing that it must be given."""
    parameters = dict(list(signature_of(model).parameters.items())[1:])  # the latents come first
    plain = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    accepted = set(plain) - set(TIMESTEP_NAMES)
    if len(plain) == len(parameters):  # no **kwargs
        for name in sorted(set(guided) - accepted):
            raise unknown("condition", name, accepted, str(path))
    required = {n for n in accepted if plain[n].default is inspect.Parameter.empty} | set(
        family.condition_shapes(model)
    )
    if missing := sorted(required - set(guided)):
        raise InputError(
            f"{path}: no tensor '{missing[0]}', which {type(model).__name__} must be called with "
            f"(the file holds: {', '.join(sorted(guided)) or 'no condition'})"
        )
    if not guided:
        raise InputError(f"{path}: holds no condition; expected some of {', '.join(sorted(accepted))}")


def _check_shapes(path: str | Path, guided: dict[str, Tensor], wanted: dict[str, tuple[int | None, ...]]) -> int:
    """How many conditions there are."""
    first = next(iter(guided))
    for name, tensor in guided.items():
        rest = wanted.get(name, tensor.shape[1:])
        fits = tensor.dim() == len(rest) + 1 and all(
            w in (None, s) for w, s in zip(rest, tensor.shape[1:], strict=True)
        )
        if not fits or not len(tensor):
            expected = ", ".join(["count", *("any" if w is None else str(w) for w in rest)])
            raise InputError(f"{path}: {name}: expected [{expected}], found {list(tensor.shape)}")
        if len(tensor) != len(guided[first]):
            raise InputError(f"{path}: {first} holds {len(guided[first])} conditions, but {name} holds {len(tensor)}")
    return len(guided[first])


def check_shared(path: str | Path, guided: dict[str, Tensor], first: dict[str, Tensor], family: Family) -> None:
    """Raises InputError for rows unlike the first of `first` where the model takes one row for all."""
    for name in family.shared:
        if name in guided and not bool((guided[name] == first[name][:1]).all()):
            raise InputError(f"{path}: {name}: the model takes one for a whole batch, so every row must be the same")


def check_unguided(path: str | Path, free: dict[str, Tensor], guided: dict[str, Tensor]) -> None:
    """Raises InputError for a condition of the unguided branch that the guided one lacks, or of another shape."""
    for name, tensor in free.items():
        if name not in guided:
            raise InputError(f"{path}: {UNGUIDED}{name} without {name}")
        full = guided[name]
        if tensor.dim() != full.dim() or tensor.shape[1:] != full.shape[1:] or len(tensor) not in (1, len(full)):
            rest = "".join(f", {size}" for size in full.shape[1:])
            raise InputError(
                f"{path}: {UNGUIDED}{name}: expected [1{rest}] or [{len(full)}{rest}], found {list(tensor.shape)}"
            )


def check_labels(path: str | Path, tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Raises InputError for class labels that are no rows of the model's embedding table."""
    config = getattr(model, "config", None)
    classes = getattr(config, "num_embeds_ada_norm", getattr(config, "num_classes", None))
    for name, labels in tensors.items():
        if name.removeprefix(UNGUIDED) != LABELS:
            continue
        whole = labels.dtype in (torch.int64, torch.int32)
        if not whole or (classes is not None and (int(labels.min()) < 0 or int(labels.max()) > classes)):
            known = "" if classes is None else f" from 0 to {classes} ({classes}: no class)"
            span = f"{labels.min().item()} to {labels.max().item()}"
            raise InputError(f"{path}: {name}: expected int64 labels{known}, found {labels.dtype} from {span}")


def _unguided(model: nn.Module, family: Family, guided: dict[str, Tensor]) -> dict[str, Tensor] | None:
    try:
        return family.unconditional(model, guided)
    except NotImplementedError:
        return None
