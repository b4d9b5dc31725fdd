"""Fixtures of the command line tests: how bad input must be refused, and ways to break a checkpoint."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def refused(cli: Callable[..., Any]) -> Callable[..., str]:
    """Runs a command that must fail well: exit code 2, one clear message on stderr with the given words, nothing left
    behind in the current folder. Returns the message."""

    def run(*arguments: str | Path, words: tuple[str, ...]) -> str:
        before = sorted(Path().rglob("*"))
        result = cli(*arguments)
        assert result.code == 2, f"exit code {result.code}\n{result.out}\n{result.err}"
        assert "Traceback" not in result.out + result.err
        lines = result.err.strip().splitlines()
        assert len(lines) == 1, f"expected one message, found:\n{result.err}"
        assert lines[0].startswith("error: ")
        missing = [word for word in words if word not in lines[0]]
        assert not missing, f"the message names no {missing}: {lines[0]}"
        assert sorted(Path().rglob("*")) == before, "something was left behind"
        return lines[0]

    return run


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Applies a function to the JSON object in a file."""

    def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return edit


@pytest.fixture
def edit_tensors() -> Callable[..., None]:
    """Applies a function to the tensors of a model folder with one weight file."""

    def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


@pytest.fixture
def sharded(copy_of: Callable[[Path], Path], tiny_folder: Path) -> Path:
    """A writable copy of the tiny DiT in two shards with an index."""
    folder = copy_of(tiny_folder)
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _settings_are_restored() -> Iterator[None]:
    """In-process commands must not leave kernel settings behind."""
    from vdit_quant.kernels import dispatch

    before = dispatch.settings()
    yield
    assert dispatch.settings() == before
