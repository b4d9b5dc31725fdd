"""Training of blocks that return an image and a text."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import vdit_quant
from vdit_quant.calibrate import block_tuning
from vdit_quant.calibrate.block_input import rows_of, streams
from vdit_quant.calibrate.block_tuning import ROWS, fit_block, hard_errors
from vdit_quant.calibrate.soft_codes import SoftCodes
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.recipe import Recipe

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SHAPES = {"encoder_hidden_states": (3, 24), "pooled_projections": (16,)}
# name -> class, its arguments, shape of a latent, what else a call needs, names of layers whose output nothing reads
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], dict[str, Any], set[str]]] = {
    "sd3": (
        "SD3Transformer2DModel",
        {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 24,
         "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8},
        (4, 8, 8),
        {},
        {"transformer_blocks.1.attn.add_q_proj"},  # the last block throws its text queries away
    ),
    "flux": (
        "FluxTransformer2DModel",
        {**HEADS, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24,
         "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)},
        (16, 4),
        {"img_ids": torch.arange(48.0).view(16, 3) % 4, "txt_ids": torch.zeros(3, 3)},
        set(),
    ),
}  # fmt: skip
RECIPE = Recipe.from_dict(
    {
        "step": [
            {
                "method": "vq4dit",
                "spec": "wvq2",
                "roles": ["attention", "feed_forward"],
                "params": {"hadamard": 16, "steps": 40},
            }
        ]
    },
    "vq2",
)


def _model(name: str) -> nn.Module:
    kind, arguments, *_ = CASES[name]
    torch.manual_seed(1)
    model = getattr(diffusers, kind)(**arguments)
    with torch.no_grad():  # nothing may start at zero, or parts of a block would not be seen
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _calls(name: str, batch: int = 12) -> list[dict[str, Any]]:
    *_, latent, extra, _ = CASES[name]
    generator = torch.Generator().manual_seed(2)
    shapes = {"hidden_states": latent, **SHAPES}
    return [
        {
            **{key: torch.randn(batch, *shape, generator=generator) for key, shape in shapes.items()},
            "timestep": torch.full((batch,), time if name == "flux" else 1000 * time),
            **extra,
        }
        for time in (0.9, 0.5, 0.1)
    ]


@pytest.mark.parametrize("name", CASES)
def test_layers_of_both_streams_learn_and_the_error_of_each_falls(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[tuple[set[str], list[float], list[float]]] = []

    def watching(module: nn.Module, layers: Any, inputs: Any, targets: Any, params: Any) -> tuple[float, float]:
        start = [(layer.book.clone(), layer.logits.clone()) for layer in layers]
        before = hard_errors(module, layers, inputs, targets)
        found = fit_block(module, layers, inputs, targets, params)
        names = {id(layer): name for name, layer in module.named_modules() if isinstance(layer, SoftCodes)}
        still = {
            names[id(layer)]
            for layer, (book, logits) in zip(layers, start, strict=True)
            if torch.equal(layer.book, book) or torch.equal(layer.logits, logits)
        }
        after = hard_errors(module, layers, inputs, targets)
        assert found == (sum(before), sum(after))
        blocks.append((still, before, after))
        return found

    monkeypatch.setattr(block_tuning, "fit_block", watching)
    model = _model(name)
    vdit_quant.compress(model, tmp_path / "out", data=_calls(name), recipe=RECIPE, device="cpu")
    names = ["transformer_blocks.0", "transformer_blocks.1" if name == "sd3" else "single_transformer_blocks.0"]
    still = {f"{block}.{layer}" for block, (layers, _, _) in zip(names, blocks, strict=True) for layer in layers}
    assert still == CASES[name][4]
    assert [len(before) for _, before, _ in blocks] == [2, 1 if name == "sd3" else 2]
    for _, before, after in blocks:
        assert all(new < 0.9 * old for old, new in zip(before, after, strict=True)), (before, after)


def test_a_layer_gets_a_gradient_from_the_stream_that_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_step(module: nn.Module, layers: Any, inputs: Any, targets: Any, params: Any) -> tuple[float, float]:
        (args, kwargs), target = inputs[0].rows(torch.arange(ROWS)), rows_of(targets[0], torch.arange(ROWS))
        outputs = streams(module(*args, **kwargs))
        for number, prefix in ((0, "ff_context"), (1, "ff")):
            grads = torch.autograd.grad(
                block_tuning._losses(outputs[number], target[number])[0],
                [layer.book for layer in layers],
                retain_graph=True,
                allow_unused=True,
            )
            names = {id(layer): name for name, layer in module.named_modules() if isinstance(layer, SoftCodes)}
            reached = {names[id(layer)].split(".")[0] for layer, g in zip(layers, grads, strict=True) if g is not None}
            assert reached == {"attn", prefix}
        raise InterruptedError

    monkeypatch.setattr(block_tuning, "fit_block", one_step)
    with pytest.raises(InterruptedError):
        vdit_quant.compress(_model("flux"), tmp_path / "out", data=_calls("flux"), recipe=RECIPE, device="cpu")


def test_a_table_as_long_as_the_batch_is_no_part_of_it(tmp_path: Path, notes: Any) -> None:
    words = torch.randn(20, 24, 24, generator=torch.Generator().manual_seed(3))
    text = {"encoder_hidden_states": words, "txt_ids": torch.zeros(24, 3)}
    data = [{**call, **text} for call in _calls("flux", 20)[:2]]  # 40 rows in all, and 16 + 24 positions
    vdit_quant.compress(_model("flux"), tmp_path / "out", data=data, recipe=RECIPE, progress=notes, device="cpu")
    assert sum("before training" in line for line in notes.lines) == 2


def test_no_activation_is_no_stream() -> None:
    x = torch.randn(4, 3)
    assert streams(x)[0] is x
    found = streams((None, x, torch.ones(4, 3, dtype=torch.long), torch.tensor(1.0), 2 * x))
    assert [t.shape for t in found] == [(4, 3), (4, 3)]
    assert torch.equal(found[1], 2 * x)
    assert streams({"sample": x, "text": None}) == (x,)


def test_a_block_that_returns_nothing_is_refused(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> list[Tensor]:
            x += self.mlp(x)
            return []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            for block in self.blocks:
                block(x)
            return x

    step = {"method": "vq4dit", "spec": "wvq2", "targets": ["blocks.*"], "params": {"hadamard": 16, "steps": 2}}
    recipe = Recipe.from_dict({"step": [step]}, "x")
    data = [torch.randn(64, 4, 32)]
    with pytest.raises(InputError, match=r"blocks\.0 returns no activations"):
        vdit_quant.compress(Model(), tmp_path / "out", data=data, recipe=recipe, device="cpu", steps=1)
