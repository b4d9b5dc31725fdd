"""Artifacts of model classes that are not here: what their files alone tell."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vdit_quant
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.layer import layer_layout
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.artifact import DTYPES
from vdit_quant.runtime.describe import describe_artifact
from vdit_quant.runtime.stand_in import find_shape

NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def traits(n: int, k: int, spec: LayerSpec) -> dict[str, Any]:
    return {key: (tensor.shape, NAMES[tensor.dtype]) for key, tensor in layer_layout(n, k, spec).items()}


@pytest.mark.parametrize("sizes", [(24, 64), (8, 192), (320, 128)])
def test_the_tensors_of_every_format_tell_the_shape(spec: LayerSpec, sizes: tuple[int, int]) -> None:
    assert find_shape(traits(*sizes, spec), spec) == sizes
    assert find_shape({**traits(*sizes, spec), "bias": ((sizes[0],), "F32")}, spec) == sizes


def test_a_padded_row_is_read_as_whole_and_other_tensors_as_none() -> None:
    spec = LayerSpec.parse("w4")
    assert find_shape(traits(8, 63, spec), spec) == (8, 64)
    assert find_shape(traits(8, 64, spec) | {"weight_scale": ((9,), "F32")}, spec) is None
    assert find_shape(traits(8, 64, spec) | {"more": ((9,), "F32")}, spec) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Ours(nn.Module):
    """A class that neither diffusers nor this package has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def artifact(tmp_path: Path, plain_recipe: Callable[[str], Any]) -> Path:
    data = [{"x": torch.randn(2, 4, 64)}]
    return vdit_quant.compress(Ours().eval(), tmp_path / "out", recipe=plain_recipe("w4g64-a8tok"), data=data)


def test_inspect_describes_a_model_of_the_users_own(artifact: Path, cli: Callable[..., Any]) -> None:
    found = describe_artifact(artifact, "cpu")
    assert (found["class"], found["known"]) == ("Ours", False)
    rows = {row["pattern"]: row for row in found["layers"]}
    assert {name: row["count"] for name, row in rows.items()} == {"blocks.*.mlp.0": 2, "blocks.*.mlp.2": 2}
    assert rows["blocks.*.mlp.0"]["bytes"] == 2 * (128 * 32 + 128 * 4 + 128)
    assert found["compressed_bytes"] + found["other_bytes"] == (artifact / WEIGHTS).stat().st_size
    shown = cli("inspect", artifact, "--device", "cpu")
    assert shown.code == 0, shown.err
    assert "Ours" in shown.out
    assert "load_into" in shown.out


def test_a_layer_that_fits_no_shape_is_one_clear_error(artifact: Path) -> None:
    tensors = load_file(artifact / WEIGHTS)
    tensors["blocks.1.mlp.2.weight_scale"] = torch.ones(3)
    save_file(tensors, artifact / WEIGHTS)
    with pytest.raises(InputError, match=r"disagree: blocks\.1\.mlp\.2 as w4g64-a8tok holds .*weight_scale F32 \[3\]"):
        describe_artifact(artifact, "cpu")
