"""What a pipeline folder must hold besides its denoiser, told from names, configs and headers before anything runs."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from ..quantize.errors import InputError
from .checkpoint import WEIGHTS, Checkpoint, read_header, read_json

MODEL_INDEX = "model_index.json"
_TRANSFORMERS_WEIGHTS = "model.safetensors"
# transformers' models by name, as importing them takes seconds; what is none (a tokenizer) needs files of its own kind
_TRANSFORMERS_MODEL = re.compile(r"(Model|Encoder|Decoder|WithProjection|ForConditionalGeneration|ForCausalLM)$")


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a pipeline folder. Raises InputError when it is no JSON object that names a class."""
    path = folder / MODEL_INDEX
    index = read_json(path)
    if not isinstance(index.get("_class_name"), str):
        found = f"found {index['_class_name']!r}" if "_class_name" in index else "found none"
        raise InputError(f"{path}: expected the name of a diffusers pipeline as _class_name, {found}")
    return index


def check_pipeline(folder: Path, denoiser: str) -> None:
    """Raises InputError unless diffusers has the class of the pipeline, and every component that the index names, but
    for `denoiser`, is there: folder, config and whole safetensors files."""
    import diffusers

    index = read_index(folder)
    name, known = index["_class_name"], [n for n in dir(diffusers) if n.endswith("Pipeline")]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise InputError(
            f"{folder / MODEL_INDEX}: diffusers {diffusers.__version__} has no pipeline '{name}'; the nearest is {near}"
        )
    for component, value in index.items():
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if component.startswith("_") or component == denoiser or not pair:  # [null, null] is left out on purpose
            continue
        _check_component(folder / component, *value)


def _check_component(folder: Path, library: str, kind: str) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        held = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
        raise InputError(
            f"{folder}: no such folder, or an empty one; {MODEL_INDEX} names the component {folder.name} ({kind}), the "
            f"pipeline has: {', '.join(held)}"
        )
    if library == "diffusers":
        _check_diffusers(folder, kind)
    elif library == "transformers" and _TRANSFORMERS_MODEL.search(kind):
        read_json(folder / "config.json")
        _check_weights(folder, _TRANSFORMERS_WEIGHTS)


def _check_diffusers(folder: Path, kind: str) -> None:
    import diffusers

    try:
        found = getattr(diffusers, kind, None)
        config = getattr(found, "config_name", None)
    except (ImportError, RuntimeError):  # a class whose dependencies are not here: loading it says which
        return
    if found is None:
        raise InputError(
            f"{folder.parent / MODEL_INDEX}: {folder.name}: diffusers {diffusers.__version__} has no class '{kind}'"
        )
    if config is not None:
        read_json(folder / config)
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
        _check_weights(folder, WEIGHTS)


def _check_weights(folder: Path, name: str) -> None:
    if (folder / name).exists():
        read_header(folder / name)
    else:
        _ = Checkpoint(folder, name).files
