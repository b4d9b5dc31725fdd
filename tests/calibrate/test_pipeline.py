"""From a checkpoint to an artifact, end to end, through the Python interface."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

import vdit_quant
from vdit_quant.calibrate.options import CALIBRATION_SEEDS, MAX_SEED
from vdit_quant.calibrate.pipeline import default_output
from vdit_quant.calibrate.progress import Progress
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.layer import dense_weight
from vdit_quant.quantize.recipe import Recipe, load_shipped, shipped
from vdit_quant.runtime.artifact import read_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
OUTPUT = {"step": [{"method": "rtn", "spec": "w4g64-a8tok", "roles": ["attention"], "params": {"clip": "output"}}]}


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("bits", shipped())
@torch.no_grad()
def test_every_shipped_recipe_runs_on_the_demo(
    bits: str,
    demo: Path,
    demo_artifact: Callable[..., Path],
    dit_inputs: Callable[..., Any],
    sqnr: Callable[..., float],
) -> None:
    folder = demo_artifact(bits)
    source, stored = _weights(demo / "transformer"), _weights(folder / "transformer")
    assert len(read_config(folder / "transformer").resolve(_layers(source))) == 56
    outside = [name for name in source if ".emb." in name or not name.startswith("transformer_blocks.")]
    assert len(outside) > 8
    assert all(torch.equal(stored[name], source[name]) for name in outside), "what is not compressed must stay"
    exact = DiTTransformer2DModel.from_pretrained(demo / "transformer")
    model = vdit_quant.load(folder, device="cpu", dtype=torch.float32).transformer
    inputs = dit_inputs(exact, batch=4)
    least = 30 if "fp8" in bits else 40 if "w8" in bits else 22  # e4m3 has three bits of mantissa: 31.5 dB a layer
    assert sqnr(model(**inputs).sample, exact(**inputs).sample) > least


@pytest.mark.parametrize(("spec_name", "limit"), [("w8-a8tok", 0.02), ("w4g64-a8tok", 0.2)])
def test_every_layer_stands_for_the_weight_it_was_made_from(
    spec_name: str, limit: float, plain_recipe: Callable[[str], Recipe], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = vdit_quant.compress(tiny_folder, tmp_path / "out", recipe=plain_recipe(spec_name))
    source, stored = _weights(tiny_folder), _weights(folder)
    specs = read_config(folder).resolve(_layers(source))
    assert len(specs) == 14
    for layer, layer_spec in specs.items():
        weight = source[f"{layer}.weight"]
        parts = {k.rpartition(".")[2]: t for k, t in stored.items() if k.rpartition(".")[0] == layer}
        dense = dense_weight({k: t for k, t in parts.items() if k != "bias"}, weight.shape[1], layer_spec)
        assert float((dense - weight).norm() / weight.norm()) < limit, layer
    for name in source.keys() - {f"{layer}.weight" for layer in specs}:
        assert torch.equal(stored[name], source[name].bfloat16()), f"{name} is not compressed and must stay as it is"


def _layers(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]


def test_provenance_says_what_was_done(demo_artifact: Callable[..., Path]) -> None:
    found = read_config(demo_artifact("w4a8") / "transformer").provenance
    assert found["source"] == "demo"
    assert found["recipe"]["name"] == "w4a8"
    assert found["workload"]["seed"] == CALIBRATION_SEEDS  # seed 0 of calibration is no seed of a comparison
    assert found["tool"].startswith("vdit-quant ")
    assert len(found["source_fingerprint"]) == 32


def test_the_config_of_the_source_is_kept(demo: Path, demo_artifact: Callable[..., Path]) -> None:
    before, after = (
        json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        for folder in (demo, demo_artifact("w4a8"))
    )
    assert after.pop("quantization_config")["quant_method"] == "vdit_quant"
    assert after == before


@pytest.mark.parametrize("clip", ["none", "output"])
def test_statistics_change_the_scales_only_where_asked(clip: str, tiny_folder: Path, tmp_path: Path) -> None:
    step = {**OUTPUT["step"][0], "params": {"clip": clip}}
    recipe = Recipe.from_dict({"step": [step]}, "mine")
    plain = vdit_quant.compress(tiny_folder, tmp_path / "a", recipe=recipe, steps=2, samples=2, seed=0)
    other = vdit_quant.compress(tiny_folder, tmp_path / "b", recipe=recipe, steps=2, samples=2, seed=1)
    differ = [name for name, t in _weights(plain).items() if not torch.equal(t, _weights(other)[name])]
    assert bool(differ) == (clip == "output")


def test_progress_is_reported_stage_by_stage(tiny_folder: Path, tmp_path: Path) -> None:
    class Listener(Progress):
        def __init__(self) -> None:
            self.stages: list[tuple[str, int]] = []
            self.done: list[int] = []

        def stage(self, name: str, total: int) -> None:
            self.stages.append((name, total))
            self.done.append(0)

        def advance(self, done: int, detail: str = "") -> None:
            assert self.done[-1] <= done <= self.stages[-1][1], "progress went back, or past its end"
            self.done[-1] = done

    listener = Listener()
    recipe = Recipe.from_dict(OUTPUT, "mine")
    vdit_quant.compress(tiny_folder, tmp_path / "out", progress=listener, recipe=recipe, steps=3, samples=20)
    assert [name for name, _ in listener.stages][-1] == "compressing"
    assert listener.done[-2:] == [total for _, total in listener.stages[-2:]], "a stage did not reach its end"


def test_a_model_with_nan_activations_names_the_layer(
    tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_dit()
    model.get_submodule("pos_embed.proj").weight.data[:] = 1e38  # finite, but not what it gives
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.attn1\.to_q.*NaN or infinity"):
        vdit_quant.compress(model, tmp_path / "out", data=[dit_inputs(model)], recipe=Recipe.from_dict(OUTPUT, "mine"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("label", "name"), [(".", "inner"), ("../inner/", "inner"), ("..", "outer"), ("owner/model", "model")]
)
def test_the_default_output_has_the_models_name(
    label: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert default_output(label, load_shipped("w4a8")) == Path(f"{name}-w4a8")


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"steps": 0}, {"steps": -3}, {"seed": -1}, {"seed": 10**14}])
def test_a_number_out_of_range_is_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(InputError, match=f"--{name} {value}: expected a whole number from"):
        vdit_quant.compress(None, tmp_path / "out", **wrong)


def test_the_largest_seed_can_be_used(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_dict(OUTPUT, "mine")
    vdit_quant.compress(tiny_folder, tmp_path / "out", recipe=recipe, steps=1, samples=1, seed=MAX_SEED)


def test_an_unknown_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="bit"):
        vdit_quant.compress(None, tmp_path / "out", bit="w4a8")
