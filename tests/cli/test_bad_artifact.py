"""A damaged artifact is refused with the same clear message by every way to open it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

import vdit_quant
from vdit_quant.quantize.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.1.attn1.to_k"
Copy = Callable[[Path], Path]
Refused = Callable[..., str]
Edit = Callable[..., None]


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{LAYER}.weight_scale"]


def _wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"] = torch.ones(63)


def _wrong_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"].bfloat16()


def _wrong_code_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].float()


def _of_another_spec(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.pre_quant_scale"] = torch.full((64,), 3.0)


DAMAGES = {
    "missing tensor": (_missing, ("found none", "none", "no file")),
    "wrong shape": (_wrong_shape, ("63",)),
    "wrong dtype": (_wrong_dtype, ("BF16", "bfloat16")),
    "wrong code dtype": (_wrong_code_dtype, ("F32", "float32")),
    "tensor of another spec": (_of_another_spec, (f"expected no {LAYER}.pre_quant_scale",)),
}


@pytest.fixture(params=DAMAGES)
def damaged(
    request: pytest.FixtureRequest, copy_of: Copy, tiny_artifact: Path, edit_tensors: Edit
) -> tuple[Path, tuple[str, ...]]:
    """An artifact whose config and tensors disagree, and the words of which a message must hold one."""
    change, words = DAMAGES[request.param]
    folder = copy_of(tiny_artifact)
    edit_tensors(folder, change)
    return folder, words


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_the_command_line_says_where_config_and_tensors_disagree(
    command: str, damaged: tuple[Path, tuple[str, ...]], refused: Refused
) -> None:
    folder, words = damaged
    message = refused(command, folder, words=("config and tensors disagree", LAYER))
    assert any(word in message for word in words)


def test_load_says_where_config_and_tensors_disagree(damaged: tuple[Path, tuple[str, ...]]) -> None:
    folder, words = damaged
    with pytest.raises(InputError, match="config and tensors disagree") as caught:
        vdit_quant.load(folder)
    assert LAYER in str(caught.value)
    assert any(word in str(caught.value) for word in words)


def test_load_into_says_where_config_and_tensors_disagree(
    damaged: tuple[Path, tuple[str, ...]], tiny_dit: Callable[..., Any]
) -> None:
    folder, _ = damaged
    with pytest.raises(InputError, match="config and tensors disagree") as caught:
        vdit_quant.load_into(tiny_dit(), folder)
    assert LAYER in str(caught.value)


def test_plain_from_pretrained_says_where_config_and_tensors_disagree(damaged: tuple[Path, tuple[str, ...]]) -> None:
    folder, words = damaged
    with pytest.raises(InputError, match="config and tensors disagree") as caught:
        DiTTransformer2DModel.from_pretrained(folder)
    assert LAYER in str(caught.value)
    assert any(word in str(caught.value) for word in words)


def test_a_config_of_fewer_blocks_is_refused(
    copy_of: Copy, tiny_artifact: Path, edit_json: Edit, refused: Refused
) -> None:
    folder = copy_of(tiny_artifact)
    edit_json(folder / "config.json", lambda d: d.update(num_layers=1))
    refused("inspect", folder, words=("config and tensors disagree: expected no transformer_blocks.1.",))
    for load in (vdit_quant.load, DiTTransformer2DModel.from_pretrained):
        with pytest.raises(InputError, match=r"config and tensors disagree: expected no transformer_blocks\.1\."):
            load(folder)


def test_buffers_that_the_model_computes_may_be_in_an_artifact(
    copy_of: Copy, tiny_artifact: Path, edit_tensors: Edit
) -> None:
    folder = copy_of(tiny_artifact)
    edit_tensors(folder, lambda tensors: tensors.update({"pos_embed.pos_embed": torch.zeros(1, 16, 64)}))
    for load in (vdit_quant.load, DiTTransformer2DModel.from_pretrained):
        assert load(folder) is not None


@pytest.mark.parametrize("version", ["2.0", "1.99", "10.0"])
def test_a_newer_schema_asks_for_an_upgrade(
    version: str, copy_of: Copy, tiny_artifact: Path, edit_json: Edit, refused: Refused
) -> None:
    folder = copy_of(tiny_artifact)
    edit_json(folder / "config.json", lambda d: d["quantization_config"].update(version=version))
    words = (version, "Upgrade")
    refused("inspect", folder, words=words)
    refused("compare", folder, words=words)
    refused("calibrate", folder, words=("already a compressed artifact",))
    for load in (vdit_quant.load, DiTTransformer2DModel.from_pretrained):
        with pytest.raises(InputError, match=f"{version}.*Upgrade"):
            load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(version="one"), ("version", "one")),
        (lambda q: q.pop("version"), ("version", "missing")),
        (lambda q: q.update(extra=1), ("extra",)),
        (lambda q: q.pop("specs"), ("specs",)),
        (lambda q: q.pop("layers"), ("layers",)),
        (lambda q: q.update(layers=[["a", "b", "c"]]), ("layers",)),
        (lambda q: q.update(specs=[1]), ("specs",)),
        (lambda q: q.update(layers=[*q["layers"], ["no.such.layer", "w8"]]), ("no.such.layer",)),
        (lambda q: q.update(layers=[*q["layers"], ["*.to_q", "w9"]]), ("w9",)),
        (lambda q: q["specs"]["w8"].update(wait=1), ("w8", "wait")),
        (lambda q: q["specs"]["w8"].pop("weight"), ("w8", "weight", "missing")),
        (lambda q: q["specs"]["w8"]["weight"].update(format="int9"), ("int9",)),
        (lambda q: q["specs"]["w8"].update(weight="int8"), ("w8", "weight", "str")),
        (lambda q: q["specs"]["w8"].update(rank="x"), ("w8", "rank")),
        (lambda q: q["specs"]["w8"].update(rank=-1), ("w8", "rank")),
        (lambda q: q["specs"]["w8"].update(pre_scale="no"), ("w8", "pre_scale")),
        (lambda q: q["specs"]["w8"].update(hadamard={"block_size": 3}), ("w8", "3")),
        (lambda q: q["specs"]["w8"].update(hadamard={"block_size": 64, "kind": "walsh"}), ("w8", "walsh")),
        (lambda q: q["specs"]["w4g64-a8tok"]["weight"].update(group_size="64"), ("group_size", "64")),
        (lambda q: q["specs"]["w4g64-a8tok"]["weight"].update(group_size=48), ("48",)),
        (lambda q: q.update(plans=None), ("plans", "None")),
        (lambda q: q.update(provenance=[1]), ("provenance", "[1]")),
        (lambda q: q.update(plans={"stepz": {}}), ("stepz", "steps")),
        (lambda q: q.update(plans={"steps": None}), ("plans.steps", "None")),
        (lambda q: q.update(plans={"steps": {"full_activation": 5}}), ("full_activation", "5")),
        (lambda q: q.update(plans={"steps": {"full_activation": [5]}}), ("[low, high]", "5")),
        (lambda q: q.update(plans={"steps": {"full_activation": [[5, "x"]]}}), ("[low, high]", "x")),
    ],
)
def test_a_broken_quantization_config(
    change: Callable[[dict[str, Any]], None],
    words: tuple[str, ...],
    copy_of: Copy,
    tiny_artifact: Path,
    edit_json: Edit,
    refused: Refused,
) -> None:
    folder = copy_of(tiny_artifact)
    edit_json(folder / "config.json", lambda d: change(d["quantization_config"]))
    refused("inspect", folder, words=words)
    with pytest.raises(InputError):
        vdit_quant.load(folder)
    with pytest.raises(InputError):
        DiTTransformer2DModel.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_load_takes_a_dtype_by_name_too(dtype: Any, tiny_artifact: Path) -> None:
    assert vdit_quant.load(tiny_artifact, dtype=dtype).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat", torch.float64])
def test_load_refuses_other_dtypes(dtype: Any, tiny_artifact: Path) -> None:
    with pytest.raises(InputError, match=r"dtype '(bfloat|float64)'.*bfloat16"):
        vdit_quant.load(tiny_artifact, dtype=dtype)


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_a_plain_checkpoint_is_not_an_artifact(command: str, refused: Refused, tiny_folder: Path) -> None:
    refused(command, tiny_folder, words=(str(tiny_folder), "quantization_config"))
    with pytest.raises(InputError, match="not a vdit-quant artifact"):
        vdit_quant.load(tiny_folder)


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_a_folder_that_is_not_there(command: str, refused: Refused) -> None:
    refused(command, "nowhere", words=("nowhere",))


def test_another_tools_quantization_is_named(
    copy_of: Copy, tiny_folder: Path, edit_json: Edit, refused: Refused
) -> None:
    folder = copy_of(tiny_folder)
    edit_json(folder / "config.json", lambda d: d.update(quantization_config={"quant_method": "torchao"}))
    refused("inspect", folder, words=("torchao", "vdit_quant"))


def test_truncated_weights(copy_of: Copy, tiny_artifact: Path, refused: Refused) -> None:
    folder = copy_of(tiny_artifact)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    for command in ("inspect", "compare"):
        refused(command, folder, words=(WEIGHTS, "not a complete safetensors file"))
    with pytest.raises(InputError, match="not a complete safetensors file"):
        vdit_quant.load(folder)


def test_a_missing_uncompressed_tensor_is_not_replaced_by_random_numbers(
    copy_of: Copy, tiny_artifact: Path, edit_tensors: Edit
) -> None:
    folder = copy_of(tiny_artifact)
    edit_tensors(folder, lambda tensors: tensors.pop("proj_out_2.weight"))
    assert "proj_out_2.weight" not in load_file(folder / WEIGHTS)
    with pytest.raises(InputError, match=r"proj_out_2\.weight"):
        vdit_quant.load(folder)


def test_compare_refuses_another_architecture(
    copy_of: Copy, tiny_artifact: Path, tiny_folder: Path, edit_json: Edit, refused: Refused
) -> None:
    other = copy_of(tiny_folder)
    edit_json(other / "config.json", lambda d: d.update(num_layers=1))
    refused("compare", tiny_artifact, "--baseline", other, words=("not the same architecture", "num_layers"))


def test_compare_refuses_an_artifact_whose_source_is_gone(
    copy_of: Copy, tiny_artifact: Path, edit_json: Edit, refused: Refused
) -> None:
    folder = copy_of(tiny_artifact)
    edit_json(folder / "config.json", lambda d: d["quantization_config"]["provenance"].update(source="gone"))
    refused("compare", folder, words=("gone", "--baseline"))
    edit_json(folder / "config.json", lambda d: d["quantization_config"]["provenance"].pop("source"))
    refused("compare", folder, words=("--baseline",))
