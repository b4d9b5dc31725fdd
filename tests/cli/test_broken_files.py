"""Files and folders of the wrong kind: the message says what lies there and what to name instead."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.checkpoint import read_header

WEIGHTS = "diffusion_pytorch_model.safetensors"
Copy = Callable[[Path], Path]
Refused = Callable[..., str]


def test_a_folder_in_the_place_of_a_file(refused: Refused, tiny_folder: Path) -> None:
    refused("convert", tiny_folder, "-o", "out", words=(str(tiny_folder), "a folder, expected a safetensors file"))


def test_a_file_that_may_not_be_read(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(InputError, match=rf"{WEIGHTS}: cannot be read \(Permission denied\)"):
        read_header(tiny_folder / WEIGHTS)


def test_a_variant_is_named(refused: Refused, copy_of: Copy, tiny_folder: Path) -> None:
    folder = copy_of(tiny_folder)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    refused("calibrate", folder, words=(f"no {WEIGHTS}", "diffusion_pytorch_model.fp16.safetensors", "a variant"))


def test_a_folder_with_a_transformer_inside_it(refused: Refused, demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo / "transformer", tmp_path / "model" / "transformer")
    words = ("not a model folder", f"name {tmp_path / 'model' / 'transformer'}")
    refused("calibrate", tmp_path / "model", words=words)


def test_a_configuration_that_is_nested_without_end(refused: Refused, copy_of: Copy, tiny_folder: Path) -> None:
    folder = copy_of(tiny_folder)
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    refused("inspect", folder, words=("config.json: not readable as JSON",))


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_a_quantization_config_that_is_no_object(
    command: str, refused: Refused, copy_of: Copy, tiny_folder: Path, edit_json: Callable[..., None]
) -> None:
    folder = copy_of(tiny_folder)
    edit_json(folder / "config.json", lambda d: d.update(quantization_config=7))
    more = ("--baseline", tiny_folder) if command == "compare" else ()
    refused(command, folder, *more, words=("config.json: quantization_config: expected a JSON object, found int",))
