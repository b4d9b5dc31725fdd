"""A checkpoint that does not hold the tensors of the model its config describes: one message at planning time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.complete import check_complete
from vdit_quant.runtime.source import find_source, load_transformer

Copy = Callable[[Path], Path]
Edit = Callable[..., None]
Refused = Callable[..., str]
RTN = ("--method", "rtn", "-o", "out")


@pytest.mark.parametrize("name", ["transformer_blocks.1.attn1.to_q.bias", "pos_embed.proj.weight"])
@pytest.mark.parametrize("options", [RTN, ("-o", "out")], ids=["rtn", "w4a8"])
def test_a_kept_tensor_is_missing(
    name: str, options: tuple[str, ...], refused: Refused, copy_of: Copy, tiny_folder: Path, edit_tensors: Edit
) -> None:
    folder = copy_of(tiny_folder)
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused("calibrate", folder, *options, words=("config and weights disagree", name, "holds no such tensor"))


def test_a_kept_tensor_of_another_shape(refused: Refused, copy_of: Copy, tiny_folder: Path, edit_tensors: Edit) -> None:
    folder, name = copy_of(tiny_folder), "transformer_blocks.1.ff.net.2.bias"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(32)}))
    refused("calibrate", folder, *RTN, words=(name, "the config says [64]", "the file holds [32]"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("pos_embed.proj.bias"), ("pos_embed.proj.bias: the model has this tensor", "holds none")),
        (lambda t: t.update({"pos_embed.proj.bias": torch.zeros(3)}), ("diffusers cannot load it (", "pos_embed.proj")),
    ],
    ids=["missing", "misshapen"],
)
def test_loading_says_the_same_of_a_model_that_was_not_planned_for(
    change: Callable[..., Any], words: tuple[str, ...], copy_of: Copy, tiny_folder: Path, edit_tensors: Edit
) -> None:
    folder = copy_of(tiny_folder)
    edit_tensors(folder, change)
    with pytest.raises(InputError) as caught:
        load_transformer(find_source(folder), torch.float32)
    assert all(word in str(caught.value) for word in (str(folder), *words)), caught.value


def test_a_config_of_fewer_blocks(
    refused: Refused, copy_of: Copy, tiny_folder: Path, edit_json: Callable[..., None]
) -> None:
    folder = copy_of(tiny_folder)
    edit_json(folder / "config.json", lambda d: d.update(num_layers=1))
    refused("calibrate", folder, *RTN, words=("transformer_blocks.1.", "a model without it", "tensors differ"))


def test_buffers_that_the_model_computes_may_be_there_or_not(
    cli: Callable[..., Any], copy_of: Copy, tiny_folder: Path, edit_tensors: Edit
) -> None:
    folder = copy_of(tiny_folder)
    assert "pos_embed.pos_embed" not in find_source(folder).checkpoint.headers
    edit_tensors(folder, lambda tensors: tensors.update({"pos_embed.pos_embed": torch.zeros(1, 16, 64)}))
    result = cli("calibrate", folder, *RTN)
    assert result.code == 0, result.err


def test_what_the_class_ignores_may_be_there(tiny_dit: Callable[..., Any]) -> None:
    class Tolerant(diffusers.DiTTransformer2DModel):  # type: ignore[misc]
        _keys_to_ignore_on_load_unexpected = ("norm_added_q",)

    model = tiny_dit()
    headers = {name: (tuple(tensor.shape), "F32") for name, tensor in model.state_dict().items()}
    headers["transformer_blocks.0.attn1.norm_added_q.weight"] = ((32,), "F32")
    with pytest.raises(InputError, match="norm_added_q"):
        check_complete(model, headers, "model")
    model.__class__ = Tolerant
    check_complete(model, headers, "model")
