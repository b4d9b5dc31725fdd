"""Several processes that train together give what one gives."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from vdit_quant.prune.pipeline import prune_model
from vdit_quant.prune.writer import read_record
from vdit_quant.runtime.checkpoint import WEIGHTS

FEW = {"keep": 1, "criterion": "sensitivity", "samples": 16, "steps": 2, "batch_size": 6, "recover": "5", "lr": 1e-3}
PROGRAM = f"from vdit_quant.prune.pipeline import prune_model; import sys; prune_model(*sys.argv[1:], **{FEW})"


def test_two_processes_give_what_one_gives(
    tiny_folder: Path, tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = tmp_path / "go.py"
    script.write_text(PROGRAM)
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = python(*run, str(script), str(tiny_folder), "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one = load_file(prune_model(tiny_folder, tmp_path / "one", **FEW) / WEIGHTS)
    two = load_file(tmp_path / "two" / WEIGHTS)
    untrained = load_file(prune_model(tiny_folder, tmp_path / "none", **{**FEW, "recover": "0"}) / WEIGHTS)

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum().sqrt())

    assert distance(one, two) < 0.05 * distance(one, untrained)
    assert read_record(tmp_path / "one")["plan"] == read_record(tmp_path / "two")["plan"]
