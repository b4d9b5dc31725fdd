"""Finding a model: a local pipeline folder, a bare transformer folder, or a hub id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quantize import registry
from ..quantize.errors import InputError, reason_of, unknown
from . import models
from .checkpoint import Checkpoint, file_traits, read_json
from .demo import DEMO, demo_path
from .pipeline_folder import MODEL_INDEX, check_pipeline, read_index

COMPONENTS = ("transformer", "transformer_2")
"""Denoisers of a pipeline: of Wan 2.2's two, the first runs the noisy steps and the second the others."""
_BARE_FILES = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.json", "scheduler/*")


@dataclass(frozen=True)
class Source:
    """A model on disk. `root` is what the user named; `transformer` is the folder of the denoiser inside it, that of
    `component` in a pipeline."""

    root: Path
    label: str
    is_pipeline: bool
    component: str = COMPONENTS[0]

    @property
    def transformer(self) -> Path:
        return self.root / self.component if self.is_pipeline else self.root

    @property
    def components(self) -> list[str]:
        """All denoisers of the pipeline; none of a bare transformer."""
        return [name for name in COMPONENTS if self.is_pipeline and (self.root / name / "config.json").exists()]

    @property
    def scheduler(self) -> Path | None:
        """The scheduler folder of the pipeline, or of a bare transformer: inside it (an artifact) or next to it."""
        near = (self.root,) if self.is_pipeline else (self.root, self.root.resolve().parent)
        found = (folder / "scheduler" for folder in near)
        return next((folder for folder in found if (folder / "scheduler_config.json").exists()), None)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.transformer / "config.json")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.transformer)

    def fingerprint(self) -> str:
        """Hash of the config and of each weight file's size, start and end: tells checkpoints apart in seconds."""
        digest = hashlib.sha256((self.transformer / "config.json").read_bytes())
        for path in sorted(set(self.checkpoint.files.values())):
            digest.update(file_traits(path))
        return digest.hexdigest()[:32]

    def skeleton(self) -> nn.Module:
        """The model on the meta device: names and shapes without weights."""
        from accelerate import init_empty_weights

        kind = model_class(self.config, self.transformer)
        config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        try:
            with init_empty_weights():
                return kind.from_config(config).eval()
        except Exception as error:  # whatever a model's constructor makes of a value it cannot use
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            path = self.transformer / "config.json"
            raise InputError(f"{path}: no {kind.__name__} can be built from this config ({reason})") from error


def find_source(model: str | Path, component: str | None = None) -> Source:
    """The source behind a path, a hub id (downloaded to the hub cache: configs and safetensors only), or "demo".

    component  which denoiser of a pipeline; None: the first that is compressed, else the first
    Raises InputError when it is neither a pipeline folder nor a transformer folder, or has no such component.
    """
    source = _find(model)
    if component is None:
        compressed = (name for name in source.components if _is_quantized(source.root / name))
        return replace(source, component=next(compressed, COMPONENTS[0]))
    if not source.is_pipeline:
        raise InputError(f"{source.label}: a bare transformer, of which there is no component '{component}'")
    if component not in source.components:
        raise unknown("component", component, source.components, source.label)
    return replace(source, component=component)


def _is_quantized(folder: Path) -> bool:
    return "quantization_config" in read_json(folder / "config.json")


def _find(model: str | Path) -> Source:
    path = Path(model)
    if path.is_dir():
        return _local(path, str(path))  # one name, however it was typed: a run is resumed by it
    if str(model) == DEMO:
        return _local(demo_path(), DEMO)
    if path.exists():
        raise InputError(f"{model}: expected a model folder, found a file")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        return _local(_download(str(model)), str(model))
    raise InputError(f"{model}: no such folder, and not a hub id of the form owner/name")


def _local(path: Path, label: str) -> Source:
    if (path / MODEL_INDEX).exists():
        read_index(path)
        if not (path / "transformer" / "config.json").exists():
            held = sorted(p.name for p in path.iterdir() if p.is_dir())
            raise InputError(f"{label}: a pipeline without a transformer/ folder (it has: {', '.join(held)})")
        return Source(path, label, True)
    if (path / "config.json").exists():
        return Source(path, label, False)
    inner = next((name for name in COMPONENTS if (path / name / "config.json").exists()), None)
    hint = "" if inner is None else f"; to use the bare transformer inside it, name {path / inner}"
    raise InputError(
        f"{label}: not a model folder: expected {MODEL_INDEX} (a diffusers pipeline) or config.json (a transformer)"
        f"{hint}"
    )


def _download(repo: str) -> Path:
    """The files of a pipeline, which are often few of those in its repository, or of a bare transformer."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        try:
            return Path(DiffusionPipeline.download(repo, use_safetensors=True, trust_remote_code=False))
        except EntryNotFoundError:  # no model_index.json
            return Path(snapshot_download(repo, allow_patterns=list(_BARE_FILES)))
    except (HfHubHTTPError, ValueError, OSError) as error:
        reason = reason_of(error.__cause__ or error)
        raise InputError(f"{repo}: no such folder here, and it could not be downloaded ({reason})") from None


def model_class(config: dict[str, Any], where: Path) -> Any:
    """The class that a transformer's config names, of diffusers or of `models`. Raises InputError for another one."""
    import diffusers

    name = config.get("_class_name")
    if not isinstance(name, str):
        raise InputError(f"{where}: config.json has no _class_name; expected a diffusers transformer")
    kind = known_class(config)
    if kind is None:
        raise InputError(f"{where}: diffusers {diffusers.__version__} has no model class '{name}'")
    return kind


def known_class(config: dict[str, Any]) -> Any:
    """As `model_class`; None for another one."""
    import diffusers

    own = {kind.__name__: kind for n in registry.names(models) for kind in [registry.find(models, n, "MODEL")]}
    name = str(config.get("_class_name"))
    kind = own.get(name) or getattr(diffusers, name, None)
    return kind if hasattr(kind, "from_config") else None


def load_transformer(source: Source, dtype: torch.dtype, device: str | torch.device = "cpu") -> nn.Module:
    """The denoiser of a source, plain or compressed, in eval mode. Raises InputError for what cannot be loaded."""
    _ = source.checkpoint.files  # its errors are clearer than the loader's
    kind = model_class(source.config, source.transformer)
    with _one_error(source.transformer):
        model: nn.Module = kind.from_pretrained(source.transformer, dtype=dtype, use_safetensors=True).eval()
    if lost := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        rest = f" ({len(lost)} tensors are missing)" if len(lost) > 1 else ""
        raise InputError(f"{source.transformer}: {lost[0]}: the model has this tensor, the file holds none{rest}")
    return model.to(device)


@contextmanager
def _one_error(folder: Path) -> Iterator[None]:
    """Whatever diffusers makes of files that it cannot use, as one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: diffusers cannot load it ({type(error).__name__}: {reason_of(error)})") from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading a local folder takes a moment; diffusers' bar for it would only break up the caller's own output."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_pipeline(source: Source, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
    """The diffusers pipeline of a source. Raises InputError for a bare transformer, and for what cannot be loaded."""
    from diffusers import DiffusionPipeline

    if not source.is_pipeline:
        raise InputError(f"{source.label}: a bare transformer; expected a pipeline folder (with model_index.json)")
    check_pipeline(source.root, source.component)
    given = {source.component: load_transformer(source, dtype, device)}
    with _no_progress_bar(), _one_error(source.root):
        pipe = DiffusionPipeline.from_pretrained(
            source.root, dtype=dtype, use_safetensors=True, trust_remote_code=False, **given
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
