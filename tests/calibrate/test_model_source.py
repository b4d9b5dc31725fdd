"""A model object of any class: what it may hold, and what calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vdit_quant
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.recipe import Recipe
from vdit_quant.runtime.artifact import read_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
GPTQ = Recipe.from_dict({"step": [{"method": "gptq", "spec": "w8", "targets": ["blocks.*"]}]}, "mine")


class Net(nn.Module):
    """Two linear layers as blocks, with buffers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("order", torch.arange(64).flip(0))
        self.register_buffer("phases", torch.arange(64) / 7)  # 16 bits would turn them
        self.register_buffer("is_used", torch.arange(64) % 3 > 0)
        self.register_buffer("mask", torch.full((64,), 0.0).index_fill(0, torch.tensor([3]), -torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x[:, self.order] * self.is_used * self.scale)
        return (x * self.phases.sin() + self.mask).softmax(-1)


def _rows() -> list[Tensor]:
    return [torch.randn(8, 64) for _ in range(3)]


@torch.no_grad()
def test_buffers_of_any_kind_are_stored_and_loaded(tmp_path: Path) -> None:
    model, rows = Net(), _rows()
    path = vdit_quant.compress(model, tmp_path / "out", rows, recipe=GPTQ)
    blank = Net()
    for buffer in blank.buffers():
        buffer.zero_()
    found = vdit_quant.load_into(blank, path)
    for name, buffer in model.named_buffers():
        assert torch.equal(found.get_buffer(name), buffer), name
    assert torch.allclose(found(rows[0]), model(rows[0]), atol=0.01)


def test_the_record_names_no_sampling_run_that_there_was_not(tmp_path: Path) -> None:
    path = vdit_quant.compress(Net(), tmp_path / "out", _rows(), recipe=GPTQ, steps=3)
    assert read_config(path).provenance["workload"] == {"data": "calls of its own", "steps": 3}


def test_a_generator_serves_every_recording_run(tmp_path: Path) -> None:
    model, rows, one_run_a_block = Net(), _rows(), 1e-9

    def compress(name: str, data: Any) -> Path:
        return vdit_quant.compress(model, tmp_path / name, data, recipe=GPTQ, stats_gb=one_run_a_block)

    listed, generated = compress("a", rows), compress("b", (row for row in rows))
    for file in listed.iterdir():
        assert (generated / file.name).read_bytes() == file.read_bytes()


def test_a_buffer_that_cannot_be_stored_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    model = Net()
    model.register_buffer("wide", torch.zeros(3, dtype=torch.float64))

    def run(model: Any) -> None:
        pytest.fail("the model was run")

    with pytest.raises(InputError, match=r"Net: wide is of type torch\.float64; expected one of BF16"):
        vdit_quant.compress(model, tmp_path / "out", run, recipe=GPTQ)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["blocks.1.0.bias", "scale"])
def test_nan_outside_weights_is_refused(name: str, tmp_path: Path) -> None:
    model = Net()
    model.state_dict()[name].fill_(torch.nan)
    with pytest.raises(InputError, match=f"{name}: .* NaN"):
        vdit_quant.compress(model, tmp_path / "out", _rows(), recipe=GPTQ)


class Mlp(nn.Module):
    """What calls its layers by the name of their argument, and drops some of what passes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(width, 64), nn.Linear(64, width), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(input=self.drop(self.fc1(input=x).relu()))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_a_model_in_training_mode_is_calibrated_as_it_will_run(tmp_path: Path) -> None:
    model, rows = Stack(Mlp(), Mlp()), [torch.randn(8, 64)]
    model.blocks[0].drop.eval()
    one, two = (vdit_quant.compress(model, tmp_path / name, rows, recipe=GPTQ) for name in "ab")
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes(), "what was dropped is in the statistics"
    modes = [module.training for module in model.modules()]
    assert modes == [module is not model.blocks[0].drop for module in model.modules()]
    found = vdit_quant.load_into(Stack(Mlp(), Mlp()), one)
    assert torch.allclose(found(rows[0]), model.eval()(rows[0]), atol=0.05)


def test_a_block_that_is_used_twice_is_refused_and_can_be_kept(tmp_path: Path) -> None:
    block, rows = Mlp(), [torch.randn(8, 64)]
    model = Stack(block, Mlp(), block)
    with pytest.raises(InputError, match=r"layer blocks\.0\.fc1 is blocks\.2\.fc1, too; .*--keep"):
        vdit_quant.compress(model, tmp_path / "out", rows, recipe=GPTQ)
    path = vdit_quant.compress(model, tmp_path / "out", rows, recipe=GPTQ, keep=("blocks.[02].*",))
    again = Mlp()
    found = vdit_quant.load_into(Stack(again, Mlp(), again), path)
    assert torch.allclose(found(rows[0]), model.eval()(rows[0]), atol=0.05)


def test_blocks_are_trained_on_the_one_call_there_is(tmp_path: Path) -> None:
    model, rows = Stack(Mlp(), Mlp()), [torch.randn(8, 64)]
    step = {"method": "vq4dit", "spec": "wvq2", "targets": ["blocks.*"], "params": {"steps": 3}}
    recipe = Recipe.from_dict({"step": [step]}, "mine")
    for data in (rows, []):
        if data:
            vdit_quant.compress(model, tmp_path / "out", data, recipe=recipe)
        else:
            with pytest.raises(InputError, match=r"never ran|not called"):
                vdit_quant.compress(model, tmp_path / "none", data, recipe=recipe)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_width_that_no_rotation_fits_names_the_layer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.fc1 \[64, 90\] with viditq: no sylvester .* K = 90; --keep"):
        vdit_quant.compress(Stack(Mlp(90), Mlp(90)), tmp_path / "out", [torch.randn(8, 90)], bits="w8a8")


@pytest.mark.parametrize("params", [{"rounding": "rtn", "rotate": "always"}, {"smooth": "search"}])
def test_a_scale_that_the_spec_asks_for_is_made_of_statistics(params: dict[str, Any], tmp_path: Path) -> None:
    model, rows = Stack(Mlp(), Mlp()), [torch.randn(8, 64)]
    step = {"method": "viditq", "spec": "w8-a8tok-s", "targets": ["blocks.*"], "params": params}
    path = vdit_quant.compress(model, tmp_path / "out", rows, recipe=Recipe.from_dict({"step": [step]}, "mine"))
    found = vdit_quant.load_into(Stack(Mlp(), Mlp()), path)
    assert torch.allclose(found(rows[0]), model.eval()(rows[0]), atol=0.1)


def test_a_model_without_blocks_is_told_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"roles found: other\); no list of two or more modules of one class"):
        vdit_quant.compress(Stack(Mlp()), tmp_path / "out", [torch.randn(8, 64)], bits="w8a8")
