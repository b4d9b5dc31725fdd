"""A model that cannot be calibrated: one message that names the file or layer, and nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WEIGHTS = "diffusion_pytorch_model.safetensors"
Copy = Callable[[Path], Path]
Refused = Callable[..., str]


def test_no_such_folder(refused: Refused) -> None:
    refused("calibrate", "nowhere", words=("nowhere", "no such folder"))


def test_a_folder_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    refused("calibrate", folder, words=(str(folder), "model_index.json", "config.json"))


def test_a_file_in_the_place_of_a_folder(refused: Refused, tiny_folder: Path) -> None:
    refused("calibrate", tiny_folder / WEIGHTS, words=(WEIGHTS, "expected a model folder", "found a file"))


def test_a_text_file_named_safetensors(refused: Refused, copy_of: Copy, tiny_folder: Path) -> None:
    folder = copy_of(tiny_folder)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    refused("calibrate", folder, words=(WEIGHTS, "not a complete safetensors file"))


@pytest.mark.parametrize("size", [0, 7, 100, -1000])
def test_a_truncated_weight_file(size: int, refused: Refused, copy_of: Copy, tiny_folder: Path) -> None:
    folder = copy_of(tiny_folder)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:size])
    refused("calibrate", folder, words=(WEIGHTS, "not a complete safetensors file", "bytes on disk"))


def test_a_truncated_shard(refused: Refused, sharded: Path) -> None:
    shard = sharded / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    refused("calibrate", sharded, words=(shard.name, "not a complete safetensors file"))


def test_a_missing_shard(refused: Refused, sharded: Path) -> None:
    (sharded / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    refused("calibrate", sharded, words=("diffusion_pytorch_model-00002-of-00002.safetensors", "missing"))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors"])
def test_a_shard_name_that_leads_out_of_the_folder(
    name: str, refused: Refused, sharded: Path, edit_json: Callable[..., None]
) -> None:
    first = sharded / "diffusion_pytorch_model-00001-of-00002.safetensors"
    (sharded.parent / "outside.safetensors").write_bytes(first.read_bytes())
    edit_json(
        sharded / f"{WEIGHTS}.index.json",
        lambda d: d["weight_map"].update({k: name for k, v in d["weight_map"].items() if v == first.name}),
    )
    refused("calibrate", sharded, words=(name, "out of the folder"))


def test_an_index_that_names_a_tensor_its_shard_does_not_hold(
    refused: Refused, sharded: Path, edit_json: Callable[..., None]
) -> None:
    edit_json(
        sharded / f"{WEIGHTS}.index.json",
        lambda d: d["weight_map"].update({"ghost": "diffusion_pytorch_model-00001-of-00002.safetensors"}),
    )
    refused("calibrate", sharded, words=("ghost", "diffusion_pytorch_model-00001-of-00002.safetensors"))


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_broken_index(text: str, refused: Refused, sharded: Path) -> None:
    (sharded / f"{WEIGHTS}.index.json").write_text(text, encoding="utf-8")
    refused("calibrate", sharded, words=(f"{WEIGHTS}.index.json",))


@pytest.mark.parametrize("text", ["{not json", '["a list"]', "{}", '{"_class_name": "NoSuchModel"}'])
def test_a_broken_config(text: str, refused: Refused, copy_of: Copy, tiny_folder: Path) -> None:
    folder = copy_of(tiny_folder)
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused("calibrate", folder, words=(str(folder),))


def test_a_config_value_that_the_model_refuses(
    refused: Refused, copy_of: Copy, tiny_folder: Path, edit_json: Callable[..., None]
) -> None:
    folder = copy_of(tiny_folder)
    edit_json(folder / "config.json", lambda d: d.update(norm_type="no_such_norm"))
    refused("calibrate", folder, words=(str(folder), "DiTTransformer2DModel"))


def test_a_config_of_another_size(
    refused: Refused, copy_of: Copy, tiny_folder: Path, edit_json: Callable[..., None]
) -> None:
    folder = copy_of(tiny_folder)
    edit_json(folder / "config.json", lambda d: d.update(attention_head_dim=64))
    refused(
        "calibrate", folder, words=("config and weights disagree", "transformer_blocks.0", "[768, 128]", "[384, 64]")
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(
    value: float, refused: Refused, copy_of: Copy, tiny_folder: Path, edit_tensors: Callable[..., None]
) -> None:
    folder = copy_of(tiny_folder)
    layer = "transformer_blocks.1.ff.net.2"

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{layer}.weight"][3, 5] = value

    edit_tensors(folder, poison)
    refused("calibrate", folder, "-o", "out", words=(layer, "1 of", "NaN or infinite"))


@pytest.mark.parametrize("name", ["transformer_blocks.1.ff.net.2.bias", "proj_out_1.weight"])
def test_a_kept_tensor_that_is_not_finite(
    name: str, refused: Refused, copy_of: Copy, tiny_folder: Path, edit_tensors: Callable[..., None]
) -> None:
    folder = copy_of(tiny_folder)
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[:2].fill_(float("nan")))
    refused("calibrate", folder, "-o", "out", "--method", "rtn", words=(name, "2 of", "NaN or infinite"))


def test_a_pipeline_without_a_transformer(refused: Refused, demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unet-pipeline"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}), encoding="utf-8")
    refused("calibrate", folder, words=("transformer", "unet"))


def test_an_artifact_is_not_calibrated_again(refused: Refused, tiny_artifact: Path) -> None:
    refused("calibrate", tiny_artifact, "-o", "out", words=(str(tiny_artifact), "already a compressed artifact"))


def test_an_output_that_exists_stays_as_it_is(refused: Refused, tiny_folder: Path) -> None:
    Path("out").mkdir()
    (Path("out") / "precious.txt").write_text("mine", encoding="utf-8")
    refused("calibrate", tiny_folder, "-o", "out", words=("out exists", "--overwrite"))
    refused("calibrate", tiny_folder, "-o", "out", "--overwrite", words=("out", "no artifact"))
    assert (Path("out") / "precious.txt").read_text(encoding="utf-8") == "mine"


def test_overwrite_never_replaces_the_checkpoint(refused: Refused, copy_of: Copy, tiny_folder: Path) -> None:
    folder = copy_of(tiny_folder)
    before = (folder / WEIGHTS).read_bytes()
    refused("calibrate", folder, "-o", folder, "--overwrite", words=(str(folder), "no artifact"))
    assert (folder / WEIGHTS).read_bytes() == before


def test_an_output_inside_the_pipeline(refused: Refused, copy_of: Copy, demo: Path) -> None:
    folder = copy_of(demo)
    words = ("lies inside the model folder", str(folder), str(folder.parent / "out"))
    refused("calibrate", folder, "-o", folder / "out", words=words)


def test_an_output_below_a_file(refused: Refused, tiny_folder: Path) -> None:
    Path("file").touch()
    refused("calibrate", tiny_folder, "-o", "file/out", words=("file/out",))


def test_debug_shows_the_traceback(cli: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        cli("--debug", "calibrate", "nowhere")
    with pytest.raises(ValueError, match="no such folder"):
        cli("calibrate", "nowhere", "--debug")
