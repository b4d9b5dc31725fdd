"""Which blocks are trained is decided when a run is planned, and said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vdit_quant
from vdit_quant.calibrate import block_tuning
from vdit_quant.calibrate.options import Options
from vdit_quant.calibrate.pipeline import plan_job
from vdit_quant.calibrate.trained_blocks import settle_training
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.recipe import Recipe, load_shipped
from vdit_quant.runtime.artifact import read_config
from vdit_quant.runtime.source import find_source

GPU, CPU = torch.device("cuda"), torch.device("cpu")
VQ = {"method": "vq4dit", "spec": "wvq2"}


def _steps(recipe: Recipe) -> list[Any]:
    return [step.params.get("steps") for step in recipe.steps if step.method == "vq4dit"]


def _recipe(*steps: dict[str, Any]) -> Recipe:
    return Recipe.from_dict({"step": list(steps)}, "mine")


@pytest.mark.parametrize("bits", ["w2a16", "w2a8", "w3a16", "w3a8"])
def test_shipped_recipes_train_on_an_accelerator_alone(bits: str, tiny_folder: Path) -> None:
    source, recipe = find_source(tiny_folder), load_shipped(bits)
    on, said = settle_training(source, recipe, Options(), GPU)
    assert _steps(on) == [600]
    assert said == ("block training: 600 steps a block; --set steps=0 leaves it out",)
    off, said = settle_training(source, recipe, Options(), CPU)
    assert _steps(off) == [0]
    assert said == ("block training: off on a CPU; --set steps=600 turns it on",)


@pytest.mark.parametrize("steps", [0, 7])
def test_a_number_wins_without_a_word(steps: int, tiny_folder: Path) -> None:
    recipe = load_shipped("w2a16").with_params((f"steps={steps}",))
    for device in (GPU, CPU):
        assert settle_training(find_source(tiny_folder), recipe, Options(), device) == (recipe, ())


def test_auto_can_be_asked_for_and_other_words_cannot(tiny_folder: Path) -> None:
    recipe = load_shipped("w2a16").with_params(("steps=7",)).with_params(("steps=auto",))
    assert _steps(settle_training(find_source(tiny_folder), recipe, Options(), GPU)[0]) == [600]
    with pytest.raises(InputError, match="expected int or auto, found 'many'"):
        recipe.with_params(("steps=many",))
    with pytest.raises(InputError, match=r"'steps' expected int or auto, found float \(1\.5\)"):
        _recipe({**VQ, "roles": ["attention"], "params": {"steps": 1.5}})


def test_nothing_is_said_where_nothing_could_be_trained(tiny_folder: Path) -> None:
    source = find_source(tiny_folder)
    assert settle_training(source, load_shipped("w4a8"), Options(), CPU) == (load_shipped("w4a8"), ())
    integers = load_shipped("w4a8").with_method("vq4dit")
    assert settle_training(source, integers, Options(), GPU)[1] == ()


def _saved(folder: Path, kind: str, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, **config}), encoding="utf-8")
    return folder


def test_it_is_off_where_it_would_take_long_or_cannot_be(
    tiny_folder: Path, tmp_path: Path, tiny_dit: Callable[..., Any]
) -> None:
    recipe = load_shipped("w2a16")
    shape = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "in_channels": 4}
    large = _saved(tmp_path / "large", "DiTTransformer2DModel", **shape, sample_size=66, patch_size=2)
    axes = {"axes_dims_rope": [8, 8, 16], "joint_attention_dim": 64, "num_single_layers": 1}
    unknown = _saved(tmp_path / "unknown", "FluxTransformer2DModel", **shape, **axes)
    switch = r"; --set steps=600 turns it on"
    folding = {"method": "ditas", "spec": "w4g64-a8tok", "roles": ["attention", "feed_forward"], "params": {"rank": 0}}
    mixed = _recipe({**VQ, "targets": ["*.ff.net.2"]}, folding)
    cases = [
        (large, recipe, Options(), "off for latents of 1,089 tokens (unasked up to 1,024)" + switch),
        (unknown, recipe, Options(), "off for latents of unknown size (unasked up to 1,024)" + switch),
        (tiny_folder, recipe, Options(offload=True), "off with --offload"),
        (tiny_folder, mixed, Options(), "off beside scales folded into other layers"),
    ]
    for folder, asked, options, why in cases:
        settled, said = settle_training(find_source(folder), asked, options, GPU)
        assert (_steps(settled), said) == ([0], (f"block training: {why}",))
    job = plan_job(tiny_dit(), tmp_path / "out", lambda model: None, Options(recipe=recipe, device="cpu"))
    assert job.notes == ("block training: off for a model object" + switch,)


def test_the_artifact_records_the_number_and_the_note_comes_once(tmp_path: Path, quick: Any, notes: Any) -> None:
    out = vdit_quant.compress(None, tmp_path / "out", progress=notes, bits="w2a16", device="cpu", **quick)
    recipe = read_config(find_source(out).transformer).provenance["recipe"]
    assert recipe["step"][0]["params"] == {"steps": 0}
    assert [line for line in notes.lines if "block training" in line] == [
        "block training: off on a CPU; --set steps=600 turns it on"
    ]


def test_the_command_line_says_it_beside_the_plan(cli: Callable[..., Any]) -> None:
    found = cli("calibrate", "--bits", "w2a16", "--device", "cpu", "--dry-run")
    assert found.code == 0
    assert found.out.count("block training: off on a CPU; --set steps=600 turns it on") == 1


@pytest.mark.parametrize("name", ["steps", "rate"])
def test_layers_of_a_block_that_ask_for_different_trainings_are_refused(name: str, tiny_folder: Path) -> None:
    one = {**VQ, "targets": ["*.ff.net.2"], "params": {"steps": 5, "rate": 0.1}}
    two = {**VQ, "roles": ["feed_forward"], "params": {"steps": 5, "rate": 0.1, name: 9}}
    with pytest.raises(InputError, match=rf"0\.ff\.net\.0\.proj and \S*0\.ff\.net\.2: .*'{name}' is 9 and"):
        plan_job(tiny_folder, None, None, Options(recipe=_recipe(one, two), device="cpu"))
    two["params"] = {"steps": 0, "rate": 9.0}
    plan_job(tiny_folder, None, None, Options(recipe=_recipe(one, two), device="cpu"))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _compress(folder: Path, recipe: Recipe, progress: Any) -> nn.Module:
    torch.manual_seed(0)
    data = [torch.randn(16, 4, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    out = vdit_quant.compress(Model().eval(), folder, data=data, recipe=recipe, progress=progress, device="cpu")
    return vdit_quant.load_into(Model(), out)


def test_layers_outside_of_blocks_are_rounded_and_named(tmp_path: Path, notes: Any) -> None:
    step = {**VQ, "targets": ["*"], "params": {"hadamard": 16, "steps": 3}}
    loaded = _compress(tmp_path / "out", _recipe(step), notes)
    assert loaded(torch.randn(2, 4, 16)).isfinite().all()
    said = [line for line in notes.lines if "outside" in line]
    assert said == ["block training: layers outside of blocks are not trained (2: x_embedder, head)"]


def test_every_layer_has_its_own_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def watching(module: nn.Module, layers: Any, *others: Any) -> tuple[float, float]:
        seen.update({layer.shape: layer.logits.shape[1] for layer in layers})
        return 0.0, 0.0

    monkeypatch.setattr(block_tuning, "fit_block", watching)
    one = {**VQ, "targets": ["*.mlp.0"], "params": {"hadamard": 16, "steps": 3, "candidates": 2}}
    two = {**VQ, "targets": ["*.mlp.2"], "params": {"hadamard": 16, "steps": 3, "candidates": 4}}
    _compress(tmp_path / "out", _recipe(one, two), None)
    assert seen == {(64, 32): 2, (32, 64): 4}


def test_a_block_with_a_layer_whose_rotation_is_searched_for_is_trained(tmp_path: Path, notes: Any) -> None:
    one = {**VQ, "targets": ["*.mlp.0"], "params": {"hadamard": 16, "steps": 3}}
    two = {"method": "viditq", "spec": "w4", "targets": ["*.mlp.2"], "params": {"hadamard": 16}}
    _compress(tmp_path / "out", _recipe(one, two), notes)
    assert len([line for line in notes.lines if "before training" in line]) == 2
