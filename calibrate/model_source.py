"""A model object in Python in the place of a model on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.artifact import DTYPES

Data = Callable[[nn.Module], Any] | Iterable[Any]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StateDict:
    """A model's tensors with the interface of `runtime.checkpoint.Checkpoint`."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = dict(model.state_dict())
        self.headers = {name: (tuple(t.shape), _NAMES.get(t.dtype, str(t.dtype))) for name, t in self.tensors.items()}
        self.files: dict[str, Path] = {}

    def get(self, name: str) -> Tensor:
        return self.tensors[name].detach().cpu()


class ModelSource:
    """`Source` for a model in memory. `data` runs it: a callable, or an iterable of keyword mappings or tuples."""

    is_pipeline = False

    def __init__(self, model: nn.Module, data: Data | None = None) -> None:
        self.model, self.data = model, data
        self.label = type(model).__name__
        self.checkpoint = StateDict(model)
        self.config = _config(model)

    def skeleton(self) -> nn.Module:
        return self.model

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for name, tensor in self.checkpoint.tensors.items():
            plain = tensor.detach().cpu().contiguous().flatten()
            digest.update(name.encode() + plain.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def run(self) -> None:
        """Runs the model over the data, in eval mode, as the artifact will."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                self._run()
        finally:
            for module in training:
                module.training = True

    def _run(self) -> None:
        if callable(self.data):
            self.data(self.model)
            return
        if isinstance(self.data, Iterator):  # it can be gone through once, and there may be several runs
            self.data = list(self.data)
        for item in self.data or ():
            if isinstance(item, Mapping):
                self.model(**item)
            else:
                self.model(*(item if isinstance(item, tuple) else (item,)))


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        plain = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
        return {"_class_name": type(model).__name__, **json.loads(json.dumps(plain, default=str))}
    return {"_class_name": type(model).__name__}
