"""The folder of an unfinished run: one run at a time, and kept where there was only no room."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_quant.calibrate.options import Options
from vdit_quant.calibrate.workspace import Workspace
from vdit_quant.evaluate.sampling import Sampler
from vdit_quant.evaluate.workload import Workload
from vdit_quant.prune.options import Options as PruneOptions
from vdit_quant.quantize.errors import InputError, OutputError

OTHER_RUN = """
import sys
from pathlib import Path
from vdit_quant.calibrate.workspace import Workspace
workspace = Workspace(Path(sys.argv[1]))
workspace.open({"seed": 0}, False)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
@pytest.mark.parametrize("resume", [False, True])
def test_an_output_that_another_run_is_writing_is_refused_and_left_alone(tmp_path: Path, resume: bool) -> None:
    command = [sys.executable, "-c", OTHER_RUN, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "open\n"
        workspace = Workspace(tmp_path / "out")
        before = (workspace.folder / "job.json").read_bytes()
        with pytest.raises(InputError, match="another run is writing it"):
            workspace.open({"seed": 5}, resume)
        assert (workspace.folder / "job.json").read_bytes() == before
        other.stdin.close()
    assert Workspace(tmp_path / "out").open({"seed": 5}, False) == ""
    assert Workspace(tmp_path / "out").open({"seed": 5}, True).startswith("resuming")  # within one process


def test_want_of_memory_while_sampling_is_no_reason_to_drop_finished_work() -> None:
    class Full(Sampler):
        def __init__(self) -> None:
            pass

        def _sample(self, *_: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(OutputError, match=r"no memory to sample 4 at a time.*--batch-size 1"):
        Full().sample_batch(Workload(samples=4), None, 0, 4)


@pytest.mark.parametrize("make", [lambda g: Options(guidance=g), lambda g: Workload(guidance_scale=g)])
@pytest.mark.parametrize("guidance", [float("nan"), float("inf")])
def test_a_guidance_that_is_no_number_is_refused(make: Any, guidance: float) -> None:
    with pytest.raises(InputError, match=r"--guidance .*expected a finite number"):
        make(guidance)


@pytest.mark.parametrize("name", ["guidance", "lr", "mask"])
def test_pruning_takes_numbers_alone(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} nan"):
        PruneOptions(keep=2, **{name: float("nan")}).check()
