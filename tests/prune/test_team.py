"""Several processes that train together give what one gives."""

import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from vdit_quant.prune.pipeline import prune_model
from vdit_quant.prune.writer import read_record
from vdit_quant.runtime.checkpoint import WEIGHTS

FEW = {"keep": 1, "criterion": "sensitivity", "samples": 16, "steps": 2, "batch_size": 6, "recover": "5", "lr": 1e-3}
FEW["device"] = "cpu"  # as in the processes, which see no GPU
PROGRAM = f"""
import os, sys
rank, port, *paths = sys.argv[1:]
place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
os.environ.update(place)  # as torchrun and accelerate do
from vdit_quant.prune.pipeline import prune_model
prune_model(*paths, **{FEW})
"""


def test_two_processes_give_what_one_gives(
    tiny_folder: Path, tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with ThreadPoolExecutor() as pool:
        line = (port, str(tiny_folder), "two")
        both = [pool.submit(python, "-c", PROGRAM, rank, *line, cwd=tmp_path) for rank in ("0", "1")]
        one = load_file(prune_model(tiny_folder, tmp_path / "one", **FEW) / WEIGHTS)
        untrained = load_file(prune_model(tiny_folder, tmp_path / "none", **{**FEW, "recover": "0"}) / WEIGHTS)
    for process in both:
        assert process.result().returncode == 0, process.result().stderr
    two = load_file(tmp_path / "two" / WEIGHTS)

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum().sqrt())

    assert distance(one, two) < 0.05 * distance(one, untrained)
    assert read_record(tmp_path / "one")["plan"] == read_record(tmp_path / "two")["plan"]
