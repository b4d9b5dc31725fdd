"""A run that dies at any moment leaves nothing that loads, and resumes to the very bytes of an undisturbed run."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vdit_quant

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")

RECIPE = """
[[step]]
method = "rtn"
spec = "w4g64-a8tok"
roles = ["attention", "feed_forward"]
params = {clip = "output"}

[[step]]
method = "rtn"
spec = "w8"
roles = ["modulation"]
"""

# A wrapper that dies where it is told: at the nth call of a function, before it or right after it.
PROGRAM = """
import os, signal, sys
import vdit_quant.calibrate.record, vdit_quant.calibrate.workspace, vdit_quant.runtime.writer
from vdit_quant.cli.main import main

place, name, count, when = sys.argv[1:5]
owner = sys.modules[place]
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), 0

def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count):
        if when == "after":
            original(*args, **kwargs)
        if when == "halfway":
            args[-1].write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, dying)
sys.argv = ["vdit-quant", *sys.argv[5:]]
main()
"""

POINTS = {
    "while recording": ("vdit_quant.calibrate.record", "Recorder._add", "12", "before"),
    "statistics half written": ("vdit_quant.calibrate.workspace", "save_file", "1", "halfway"),
    "statistics of one block saved": ("vdit_quant.calibrate.workspace", "Workspace.save", "1", "after"),
    "all statistics saved": ("vdit_quant.calibrate.workspace", "Workspace.save", "2", "after"),
    "second block half written": ("vdit_quant.calibrate.workspace", "save_file", "4", "halfway"),
    "artifact half written": ("vdit_quant.runtime.writer", "save_file", "1", "halfway"),
    "artifact not yet renamed": ("vdit_quant.runtime.writer", "write_json", "1", "after"),
}


def _arguments(model: Path, recipe: Path) -> list[str]:
    where = ("-o", "out", "--device", "cpu")  # as in the processes that are killed, which see no GPU
    return ["calibrate", str(model), *where, "--recipe", str(recipe), "--steps", "4", "--samples", "3"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "clipped.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(
    tiny_folder: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory, python: Callable[..., Any]
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    program = "from vdit_quant.cli.main import main; main()"
    done = python("-c", program, *_arguments(tiny_folder, recipe), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def _assert_same_files(got: Path, want: Path) -> None:
    def names(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

    assert names(got) == names(want)
    for name in names(want):
        assert (got / name).read_bytes() == (want / name).read_bytes(), name


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes_to_the_same_bytes(
    point: str, tiny_folder: Path, recipe: Path, undisturbed: Path, python: Callable[..., Any], cli: Callable[..., Any]
) -> None:
    arguments = _arguments(tiny_folder, recipe)
    done = python("-c", PROGRAM, *POINTS[point], *arguments, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path("out").exists(), "something is there before it is complete"
    recorded = list(Path(".out.partial").glob("stats-*.safetensors"))
    again = [f"{tiny_folder}/" if part == str(tiny_folder) else part for part in arguments]  # the same folder, typed so
    result = cli(*again, "--resume")
    assert result.code == 0, result.err
    assert "resuming" in result.out
    assert ("recording" in result.out) == (len(recorded) < 2), "finished work was done again, or missing work was not"
    _assert_same_files(Path("out"), undisturbed)
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_without_resume_a_killed_run_starts_anew(
    tiny_folder: Path, recipe: Path, undisturbed: Path, python: Callable[..., Any], cli: Callable[..., Any]
) -> None:
    arguments = _arguments(tiny_folder, recipe)
    python("-c", PROGRAM, *POINTS["artifact half written"], *arguments, cwd=Path.cwd())
    partial = Path("partial-copy")
    shutil.copytree(".out.partial", partial)
    for options, changed in (
        (("--seed", "1"), "workload"),
        (("--steps", "5"), "workload"),
        (("--keep", "*.to_q"), "recipe"),
        (("--group-size", "32"), "recipe"),
    ):
        result = cli(*arguments, *options, "--resume")
        assert result.code == 2
        assert "other settings" in result.err
        assert changed in result.err
        assert not Path("out").exists()
        _assert_same_files(Path(".out.partial"), partial)
    result = cli(*arguments)
    assert result.code == 0, result.err
    assert "resuming" not in result.out
    _assert_same_files(Path("out"), undisturbed)
    assert not Path(".out.partial").exists()


@pytest.mark.parametrize("part", ["stats-0001.safetensors", "block-0001.safetensors"])
def test_a_damaged_part_is_named_and_made_anew_once_it_is_deleted(
    part: str, tiny_folder: Path, recipe: Path, undisturbed: Path, cli: Callable[..., Any], monkeypatch: Any
) -> None:
    arguments, folder = _arguments(tiny_folder, recipe), Path(".out.partial")
    with monkeypatch.context() as patch:
        patch.setattr("vdit_quant.calibrate.pipeline.write_artifact", _interrupt)
        assert cli(*arguments).code == 130
    whole = (folder / part).read_bytes()
    (folder / "block-0001.safetensors").unlink()  # its statistics are read for nothing else
    (folder / part).write_bytes(whole[: len(whole) // 2])
    result = cli(*arguments, "--resume")
    assert result.code == 2
    assert str(folder / part) in result.err
    assert "delete it" in result.err
    (folder / part).unlink()
    assert cli(*arguments, "--resume").code == 0
    _assert_same_files(Path("out"), undisturbed)


def test_damaged_settings_of_an_interrupted_run_are_named(
    tiny_folder: Path, recipe: Path, cli: Callable[..., Any]
) -> None:
    Path(".out.partial").mkdir()
    Path(".out.partial/job.json").write_text("{", encoding="utf-8")
    result = cli(*_arguments(tiny_folder, recipe), "--resume")
    assert result.code == 2
    assert "job.json" in result.err
    assert "start without --resume" in result.err


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_resume_with_nothing_to_resume_just_runs(
    tiny_folder: Path, recipe: Path, undisturbed: Path, cli: Callable[..., Any]
) -> None:
    result = cli(*_arguments(tiny_folder, recipe), "--resume")
    assert result.code == 0
    assert "no interrupted run of out" in result.out
    _assert_same_files(Path("out"), undisturbed)


def test_an_interruption_says_what_is_kept_and_a_new_run_what_it_drops(
    tiny_folder: Path, recipe: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _arguments(tiny_folder, recipe)
    with monkeypatch.context() as patch:
        patch.setattr("vdit_quant.calibrate.pipeline.write_artifact", _interrupt)
        first, second = cli(*arguments), cli(*arguments)
        other = cli(*arguments, "--seed", "1")
    kept = "interrupted; finished parts are in .out.partial: the same command with --resume goes on\n"
    assert (first.code, first.err) == (130, kept)
    assert "starting anew" not in first.out
    assert "finished part(s) of an interrupted run are dropped; --resume would have gone on" in second.out
    assert "they are of other settings" in other.out
    monkeypatch.setattr("vdit_quant.calibrate.pipeline.statistics.gather", _interrupt)
    early = cli(*arguments)
    assert (early.code, early.err) == (130, "interrupted\n")


@pytest.mark.slow
def test_a_real_kill_of_the_real_command(
    quick: dict[str, int], environment: dict[str, str], cli: Callable[..., Any], tmp_path: Path
) -> None:
    program = "from vdit_quant.cli.main import main; main()"
    settings = [str(part) for name, value in {**quick, "device": "cpu"}.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-c", program, "calibrate", "-o", "demo-w4a8", *settings]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not Path(".demo-w4a8.partial/block-0001.safetensors").exists() and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.005)
        process.kill()
    if not Path("demo-w4a8").exists():
        result = cli("calibrate", "-o", "demo-w4a8", *settings, "--resume")
        assert result.code == 0, result.err
    _assert_same_files(Path("demo-w4a8"), vdit_quant.compress(None, tmp_path / "whole", device="cpu", **quick))
