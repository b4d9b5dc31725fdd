"""A pipeline whose parts besides the denoiser are broken: one message before anything runs, with no artifact left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLED = ("--samples", "2", "--steps", "2", "-o", "out")
UNSAMPLED = ("--bits", "w8a16", "-o", "out")
Copy = Callable[[Path], Path]
Refused = Callable[..., str]


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no vae": (lambda p: _remove(p / "vae"), ("vae", "no such folder", "AutoencoderKL", "scheduler, transformer")),
    "no vae config": (lambda p: (p / "vae" / "config.json").unlink(), ("vae/config.json", "no such file")),
    "truncated vae": (lambda p: _truncate(p / "vae" / WEIGHTS), (f"vae/{WEIGHTS}", "not a complete")),
    "no vae weights": (lambda p: (p / "vae" / WEIGHTS).unlink(), ("vae: no", WEIGHTS)),
    "no scheduler": (lambda p: _remove(p / "scheduler"), ("scheduler", "no such folder", "DDIMScheduler")),
    "broken scheduler": (
        lambda p: (p / "scheduler" / "scheduler_config.json").write_text("{nonsense"),
        ("scheduler_config.json", "not readable as JSON"),
    ),
}
INDEXES = {
    "{": "not readable as JSON",
    "{}": "expected the name of a diffusers pipeline as _class_name, found none",
    "[]": "expected a JSON object, found list",
    '{"_class_name": 7}': "found 7",
    '{"_class_name": "DiTPipelin"}': "has no pipeline 'DiTPipelin'; the nearest is DiTPipeline",
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("options", [SAMPLED, UNSAMPLED, ("--dry-run",)], ids=["sampled", "unsampled", "dry run"])
def test_a_broken_component(case: str, options: tuple[str, ...], refused: Refused, copy_of: Copy, demo: Path) -> None:
    folder, (damage, words) = copy_of(demo), BROKEN[case]
    damage(folder)
    refused("calibrate", folder, *options, words=(str(folder), *words))


@pytest.mark.parametrize("text", INDEXES)
@pytest.mark.parametrize("options", [SAMPLED, UNSAMPLED], ids=["sampled", "unsampled"])
def test_a_broken_index(text: str, options: tuple[str, ...], refused: Refused, copy_of: Copy, demo: Path) -> None:
    folder = copy_of(demo)
    (folder / "model_index.json").write_text(text, encoding="utf-8")
    refused("calibrate", folder, *options, words=(str(folder / "model_index.json"), INDEXES[text]))


def test_a_component_of_a_class_that_is_not_there(
    refused: Refused, copy_of: Copy, demo: Path, edit_json: Callable[..., None]
) -> None:
    folder = copy_of(demo)
    edit_json(folder / "model_index.json", lambda d: d.update(vae=["diffusers", "NoSuchVae"]))
    refused("calibrate", folder, *UNSAMPLED, words=("model_index.json: vae", "NoSuchVae"))


def test_what_only_loading_tells(refused: Refused, copy_of: Copy, demo: Path, edit_json: Callable[..., None]) -> None:
    folder = copy_of(demo)
    edit_json(folder / "vae" / "config.json", lambda d: d.update(act_fn="no_such_function"))
    refused("calibrate", folder, *SAMPLED, words=(str(folder), "diffusers cannot load it ("))


def test_an_absent_component_is_no_fault(
    cli: Callable[..., Any], copy_of: Copy, demo: Path, edit_json: Callable[..., None]
) -> None:
    folder = copy_of(demo)
    edit_json(folder / "model_index.json", lambda d: d.update(safety_checker=[None, None], guided=False))
    result = cli("calibrate", folder, "--dry-run")
    assert result.code == 0, result.err


def test_a_text_encoder_has_a_config_and_weights_and_a_tokenizer_need_not(tmp_path: Path) -> None:
    from vdit_quant.quantize.errors import InputError
    from vdit_quant.runtime.pipeline_folder import check_pipeline

    parts = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **parts}), encoding="utf-8")
    for name, file in (("text_encoder", "config.json"), ("tokenizer", "vocab.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"text_encoder: no model\.safetensors and no model\.safetensors\.index\.json"):
        check_pipeline(tmp_path, "transformer")
