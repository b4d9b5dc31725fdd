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

GPTQ = Recipe.from_dict({"step": [{"method": "gptq", "spec": "w8", "targets": ["blocks.*"]}]}, "mine")


class Net(nn.Module):
    """Two linear layers as blocks, with buffers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("order", torch.arange(64).flip(0))
        self.register_buffer("is_used", torch.arange(64) % 3 > 0)
        self.register_buffer("mask", torch.full((64,), 0.0).index_fill(0, torch.tensor([3]), -torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x[:, self.order] * self.is_used * self.scale)
        return (x + self.mask).softmax(-1)


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
