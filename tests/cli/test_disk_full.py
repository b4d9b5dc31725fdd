"""A disk that fills up: one message, no half artifact, and finished work that a resumed run uses."""

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vdit_quant.calibrate import workspace
from vdit_quant.runtime import writer

Cli = Callable[..., Any]


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _check(result: Any) -> None:
    assert result.code == 2, result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert "No space left" in result.err
    assert "out" in result.err
    assert not Path("out").exists()
    assert not list(Path().glob("*.writing")) + list(Path().glob(".*.writing"))
    assert not list(Path().rglob("*.tmp"))


def test_while_the_artifact_is_written(cli: Cli, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", _no_space)
        _check(cli("calibrate", tiny_folder, "-o", "out"))
    assert Path(".out.partial").is_dir(), "the finished blocks are lost"
    with monkeypatch.context() as patch:
        patch.setattr("vdit_quant.calibrate.pipeline.compress_unit", _no_space)  # nothing is compressed again
        result = cli("calibrate", tiny_folder, "-o", "out", "--resume")
    assert result.code == 0, result.err
    assert [p.name for p in Path().iterdir()] == ["out"]


def test_while_a_finished_block_is_kept(cli: Cli, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "save_file", _no_space)
        _check(cli("calibrate", tiny_folder, "-o", "out"))
    assert cli("calibrate", tiny_folder, "-o", "out", "--resume").code == 0
    assert [p.name for p in Path().iterdir()] == ["out"]


@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_a_real_write_error(limit: int, python: Callable[..., Any], tiny_folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes the writes themselves fail: of the first block, or of the artifact."""
    resource = pytest.importorskip("resource")
    assert resource.RLIMIT_FSIZE is not None
    program = (
        "import resource, sys\n"
        "from vdit_quant.cli.main import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.argv = ['vdit-quant', 'calibrate', {str(tiny_folder)!r}, '-o', 'out']\n"
        "main()\n"
    )
    done: subprocess.CompletedProcess[str] = python("-c", program, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.writing"))
