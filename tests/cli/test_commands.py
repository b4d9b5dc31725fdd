"""What each command prints and leaves, on good input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vdit_quant
from vdit_quant.cli import commands
from vdit_quant.kernels.dispatch import KernelUnavailable
from vdit_quant.quantize import registry
from vdit_quant.quantize.recipe import shipped
from vdit_quant.runtime import doctor

Cli = Callable[..., Any]


@pytest.mark.parametrize("command", registry.names(commands))
def test_every_command_explains_itself(command: str, cli: Cli) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert "Usage" in result.out
    assert len(result.out.splitlines()) > 5


def test_a_kernel_that_must_run_and_cannot_is_an_error_of_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise KernelUnavailable("int8_linear: the Triton kernel cannot run and falling back is refused: no GPU")

    monkeypatch.setattr(doctor, "examine", refuse)
    result = cli("doctor")
    assert result.code == 2
    assert " ".join(result.err.split()).startswith("error: int8_linear: the Triton kernel cannot run")
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", registry.names(commands))
def test_an_unknown_option_is_a_usage_error(command: str, cli: Cli) -> None:
    result = cli(command, "--no-such-option")
    assert result.code == 2
    assert "--no-such-option" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", registry.names(commands))
def test_a_switch_that_is_off_has_no_second_name(command: str, cli: Cli) -> None:
    names = {word for word in cli(command, "--help").out.split() if word.startswith("--no-")}
    assert names <= {"--no-compile"}  # which is neither on nor off unless given


def test_help_lists_every_command(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(command in result.out for command in registry.names(commands))


@pytest.mark.parametrize("bits", shipped())
def test_dry_run_prints_the_plan_and_writes_nothing(bits: str, cli: Cli, tiny_folder: Path) -> None:
    result = cli("calibrate", tiny_folder, "--bits", bits, "--dry-run", "-o", "out")
    assert result.code == 0, result.err
    assert "transformer_blocks.*.attn1.to_q" in result.out
    assert "modulation" in result.out
    assert not list(Path().iterdir())


@pytest.mark.parametrize(("given", "told"), [((), True), (("--set", "rotate=always"), False)])
def test_dry_run_tells_of_what_calibration_decides(
    given: tuple[str, ...], told: bool, cli: Cli, tiny_folder: Path
) -> None:
    result = cli("calibrate", tiny_folder, "--bits", "w4a8", "--dry-run", *given)
    assert result.code == 0, result.err
    assert ("err less without their rotation" in result.out) == told


def test_calibrate_writes_one_folder_and_says_where(cli: Cli, tiny_folder: Path) -> None:
    result = cli("calibrate", tiny_folder, "--bits", "w8a8", "-o", "deep/er/out")
    assert result.code == 0, result.err
    assert "deep/er/out" in result.out
    assert [p.name for p in Path("deep/er").iterdir()] == ["out"]
    assert sorted(p.name for p in Path("deep/er/out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_the_next_command_has_the_conditions(cli: Cli, tiny_folder: Path) -> None:
    save_file({"class_labels": torch.arange(3)}, "c.safetensors")
    result = cli("calibrate", tiny_folder, "--bits", "w8a16", "-o", "out", "--conditions", "c.safetensors")
    assert result.code == 0, result.err
    assert "vdit-quant compare out --conditions c.safetensors\n" in result.out
    few = ("--keep", "1", "--criterion", "even", "--recover", "0", "--samples", "8", "--steps", "1")
    result = cli("prune", tiny_folder, "-o", "shallow", *few, "--conditions", "c.safetensors")
    assert result.code == 0, result.err
    assert "vdit-quant compare shallow --conditions c.safetensors\n" in result.out
    assert "prune --help" not in result.out


def test_names_with_brackets_are_printed_as_they_are(cli: Cli, tiny_folder: Path) -> None:
    result = cli("calibrate", tiny_folder, "--bits", "w8a8", "-o", "out[a]/b[/x]")
    assert result.code == 0, result.err
    assert "wrote out[a]/b[/x]" in result.out
    assert "inspect 'out[a]/b[/x]'" in result.out, "a shell would take it for a pattern"
    assert "out[a]/b[/x]" in cli("inspect", "out[a]/b[/x]").out
    assert "no[b]where" in cli("inspect", "no[b]where").err


def test_calibrate_names_its_output_after_model_and_recipe(cli: Cli, tiny_folder: Path) -> None:
    assert cli("calibrate", tiny_folder, "--bits", "w8a16").code == 0
    assert [p.name for p in Path().iterdir()] == ["tiny-dit-w8a16"]


def test_a_recipes_name_names_a_folder_here(cli: Cli, tiny_folder: Path) -> None:
    text = 'name = "../../my int 8"\n[[step]]\nmethod = "rtn"\nspec = "w8"\nroles = ["attention"]\n'
    Path("mine.toml").write_text(text, encoding="utf-8")
    result = cli("calibrate", tiny_folder, "--recipe", "mine.toml")
    assert result.code == 0, result.err
    assert {p.name for p in Path().iterdir()} == {"mine.toml", "tiny-dit-my-int-8"}


def test_written_files_can_be_read_by_others(cli: Cli, tiny_folder: Path) -> None:
    assert cli("calibrate", tiny_folder, "-o", "out").code == 0
    plain = Path("plain")
    plain.touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path("out").iterdir()}
    assert set(modes.values()) == {plain.stat().st_mode & 0o777}, modes


def test_keep_leaves_a_layer_out(cli: Cli, tiny_folder: Path) -> None:
    assert cli("calibrate", tiny_folder, "-o", "out", "--keep", "*.to_q", "--keep", "transformer_blocks.0.*").code == 0
    found = json.loads(cli("inspect", "out", "--json").out)
    assert sum(row["count"] for row in found["layers"]) == 6
    assert not any("to_q" in row["pattern"] for row in found["layers"])


def test_ternary_weights_take_a_word(cli: Cli, tiny_folder: Path) -> None:
    Path("mine.toml").write_text('[[step]]\nmethod = "rtn"\nspec = "wt-a8tok"\nroles = ["feed_forward"]\n')
    assert cli("calibrate", tiny_folder, "-o", "out", "--recipe", "mine.toml").code == 2
    assert cli("calibrate", tiny_folder, "-o", "out", "--recipe", "mine.toml", "--i-know").code == 0
    assert "wt-a8tok" in cli("inspect", "out").out


def test_a_converted_checkpoint_says_how_to_load_it(cli: Cli) -> None:
    packed = {"a.weight": torch.zeros(2, 16, dtype=torch.uint8), "a.alphas": torch.ones(1)}
    save_file(packed, "ternary.safetensors")
    result = cli("convert", "ternary.safetensors", "-o", "out", "--activations", "a8tok")
    assert result.code == 0
    assert "1 ternary layers, 128 weights, as wt-a8tok" in result.out
    assert "load_into" in result.out
    assert (Path("out") / "config.json").exists()


def test_overwrite_replaces_an_artifact(cli: Cli, tiny_folder: Path) -> None:
    assert cli("calibrate", tiny_folder, "-o", "out", "--bits", "w4a8").code == 0
    before = json.loads(cli("inspect", "out", "--json").out)["compressed_bytes"]
    assert cli("calibrate", tiny_folder, "-o", "out", "--bits", "w8a8", "--overwrite").code == 0
    assert json.loads(cli("inspect", "out", "--json").out)["compressed_bytes"] > before


@pytest.mark.parametrize("given", [(), ("--overwrite",)])
def test_the_current_folder_is_refused_before_the_work(given: tuple[str, ...], cli: Cli, tiny_folder: Path) -> None:
    result = cli("calibrate", tiny_folder, "-o", ".", "--bits", "w8a8", *given)
    assert result.code == 2
    assert "name a folder inside it" in result.err
    assert not list(Path().iterdir())


def test_a_link_is_refused_before_the_work(cli: Cli, tiny_folder: Path) -> None:
    Path("to").mkdir()
    Path("link").symlink_to("to")
    result = cli("calibrate", tiny_folder, "-o", "link", "--bits", "w8a8", "--overwrite")
    assert result.code == 2
    assert "name the folder that it leads to" in result.err


def test_inspect_json_adds_up(cli: Cli, demo_artifact: Callable[..., Path]) -> None:
    folder = demo_artifact("w4a8")
    result = cli("inspect", folder, "--json", "--device", "cpu")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["class"] == "DiTTransformer2DModel"
    assert found["compressed_bytes"] == sum(row["bytes"] for row in found["layers"])
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert found["compressed_bytes"] + found["other_bytes"] == weights.stat().st_size
    assert sum(row["count"] for row in found["layers"]) == 56
    assert all(4 <= row["bits_per_weight"] < 9 for row in found["layers"])
    assert any("CPU" in reason for reason in found["reasons"])


def test_inspect_prints_a_table(cli: Cli, tiny_artifact: Path) -> None:
    result = cli("inspect", tiny_artifact)
    assert result.code == 0, result.err
    assert "transformer_blocks.*.ff.net.2" in result.out
    assert "w4g64-a8tok" in result.out


def test_a_narrow_terminal_shows_whole_names(cli: Cli, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vdit_quant.cli import console

    monkeypatch.setattr(console.console, "_width", 80)
    lines = cli("inspect", tiny_artifact).out.splitlines()
    at = lines.index("transformer_blocks.*.attn1.to_q")
    assert "w4g64-a8tok" in lines[at + 1]
    assert "int4_linear" in lines[at + 1]
    assert max(map(len, lines[at : at + 2])) <= 80
    monkeypatch.setattr(console.console, "_width", 140)
    assert any("to_q " in line and "int4_linear" in line for line in cli("inspect", tiny_artifact).out.splitlines())


def test_a_comparison_is_never_written_into_the_model(
    cli: Cli, tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vdit_quant.cli.commands.compare import _folder

    artifact = tmp_path / "art"
    shutil.copytree(tiny_artifact, artifact)
    monkeypatch.chdir(artifact)
    assert _folder(Path("."), None) == tmp_path / "art-compare"
    monkeypatch.chdir(tmp_path)
    assert _folder(Path("art"), None) == Path("art-compare")
    result = cli("compare", "art", "-o", "art/report")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "lies inside art" in result.err


def test_the_version_is_shown_without_a_command(cli: Cli) -> None:
    result = cli("--version")
    assert (result.code, result.out.strip()) == (0, vdit_quant.__version__)


def test_doctor_json_has_a_reason_for_every_kernel_that_falls_back(cli: Cli) -> None:
    result = cli("doctor", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["machine"]["torch"]
    assert found["machine"]["vdit-quant"] == vdit_quant.__version__
    assert found["kernels"]
    assert all(row["backend"] == "triton" or row["reason"] for row in found["kernels"])
    assert cli("doctor").code == 0


def test_compare_writes_json_and_picture(cli: Cli, demo_artifact: Callable[..., Path]) -> None:
    folder = demo_artifact("w8a8")
    options = ("--samples", "2", "--steps", "2", "--seed", "3", "--device", "cpu")
    result = cli("compare", folder, *options, "-o", "report")
    assert result.code == 0, result.err
    assert "PSNR" in result.out
    found = json.loads(Path("report/comparison.json").read_text(encoding="utf-8"))
    assert [seed["seed"] for seed in found["seeds"]] == [3]
    assert Path("report/samples.png").read_bytes().startswith(b"\x89PNG")
