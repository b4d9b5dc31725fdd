"""Which two models can be compared sample by sample: those that turn the same noise and conditions into samples."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantize.errors import InputError
from ..runtime.artifact import is_artifact, read_config
from ..runtime.family import find_family
from ..runtime.lineage import is_pruned, short_record
from ..runtime.load import check_artifact
from ..runtime.source import Source, find_source
from .conditions import Conditions
from .sampling import load_scheduler


def check_pair(model: str | Path, baseline: str | Path) -> None:
    """Raises InputError unless `model` is a whole artifact or a pruned model, with inputs, outputs and scheduler of
    `baseline`."""
    ours = find_source(model)
    theirs = find_source(baseline, same_component(ours, baseline))
    if is_artifact(ours.transformer) or not is_pruned(ours.transformer):
        check_artifact(ours)
    check_same(ours, theirs)
    check_schedulers(ours, theirs)


def same_component(source: Source, other: str | Path) -> str | None:
    """The denoiser of a pipeline `other` that corresponds to a source's."""
    return source.component if source.component in find_source(other).components else None


def check_same(model: Source, baseline: Source) -> None:
    """Raises InputError unless the two are one architecture: one class and one config, the number of blocks excepted
    when `model` is a pruned model or was made from one."""
    if is_artifact(baseline.transformer):
        raise InputError(f"{baseline.label}: a compressed artifact; expected a full-precision model as the baseline")
    if model.is_pipeline != baseline.is_pipeline:
        whole, bare = (model, baseline) if model.is_pipeline else (baseline, model)
        raise InputError(f"{whole.label} is a pipeline and {bare.label} a bare transformer; compare like with like")
    kinds = [str(source.config.get("_class_name")) for source in (model, baseline)]
    different = [f"{kinds[0]} and {kinds[1]}"] if kinds[0] != kinds[1] else _differences(model, baseline)
    if different:
        raise InputError(
            f"{model.label} and {baseline.label} are not the same architecture ({', '.join(different)}); "
            "compare a model with the checkpoint it was made from"
        )


def check_schedulers(model: Source, baseline: Source) -> None:
    """Raises InputError when the two have schedulers of another class or config: from the same noise these lead to
    other samples, whatever the model. A model without a scheduler of its own is sampled with the baseline's."""
    if model.scheduler is None:
        return
    ours, theirs = load_scheduler(model), load_scheduler(baseline)
    kinds = [type(scheduler).__name__ for scheduler in (ours, theirs)]
    different = [" and ".join(kinds)] if kinds[0] != kinds[1] else _unlike(_settings(ours), _settings(theirs))
    if different:
        raise InputError(
            f"{model.scheduler} and {baseline.scheduler or f'{baseline.label} (no scheduler/: {kinds[1]})'} are not "
            f"the same scheduler ({', '.join(different)}); expected both models to be sampled with one"
        )


def calibrated_size(model: Path) -> str | None:
    """The size of the samples that an artifact was calibrated on, where it was asked for."""
    source = find_source(model)
    if not is_artifact(source.transformer):
        return None
    size = read_config(source.transformer).provenance.get("workload", {}).get("size")
    return size if isinstance(size, str) else None


def default_baseline(model: Path) -> str:
    """The model that an artifact or a pruned model says it was made from. Raises InputError when it says nothing, or
    what lies there now is another checkpoint."""
    source = find_source(model)
    pruned = None if is_artifact(source.transformer) else short_record(source.transformer)
    record = read_config(source.transformer).provenance if pruned is None else pruned
    if not record.get("source"):
        raise InputError(f"{model}: does not say what it was made from; pass --baseline MODEL")
    name, recorded = str(record["source"]), record.get("source_fingerprint")
    try:
        found = find_source(name, same_component(source, name)).fingerprint()
    except InputError as error:
        raise InputError(f"{error}; {model} was made from it; --baseline MODEL compares with another") from None
    if recorded is not None and found != recorded:
        raise InputError(
            f"{name}: not the checkpoint that {model} was made from: it has changed since, or is another one of that "
            f"name; --baseline {name} compares with it all the same"
        )
    return name


def digest_conditions(conditions: Any) -> str:
    """A name for what a sampler asks for, the same for the same samples: text embeddings are too large to keep."""
    digest = hashlib.sha256()
    _feed(digest.update, conditions)
    return digest.hexdigest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, Conditions):
        _feed(update, vars(value))
    elif isinstance(value, dict):
        for name in sorted(value):
            update(f"{name}:".encode())
            _feed(update, value[name])
    elif isinstance(value, Tensor):
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        for row in torch.atleast_1d(value):
            update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        update(f"{value!r};".encode())


def _differences(model: Source, baseline: Source) -> list[str]:
    """Config entries in which the two differ; depths, of which a pruned model has less, are all right alone in one."""
    ours, theirs = ({k: v for k, v in s.config.items() if not k.startswith("_")} for s in (model, baseline))
    ours.pop("quantization_config", None)
    names = _unlike(ours, theirs)
    if names and _was_pruned(model) and set(names) <= set(find_family(model.skeleton()).depths):
        return []
    return names


def _settings(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config, without the keys that its class does not know: who wrote it, settings of other versions."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in known}


def _unlike(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def _was_pruned(source: Source) -> bool:
    if is_artifact(source.transformer):
        return "pruned" in read_config(source.transformer).provenance
    return is_pruned(source.transformer)
