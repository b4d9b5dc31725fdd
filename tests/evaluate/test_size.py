"""The size of samples: how it is written, and who takes one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_quant.evaluate.sampling import Workload, make_sampler
from vdit_quant.evaluate.size import parse_size, size_arguments
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.source import find_source


def test_a_size_is_written_height_first_and_frames_before_it() -> None:
    assert parse_size(None) is None
    assert parse_size("512x768") == (512, 768)
    assert parse_size("33X480x832") == (33, 480, 832)
    accepts = ("height", "width", "num_frames")
    assert size_arguments((33, 480, 832), accepts, "A") == {"num_frames": 33, "height": 480, "width": 832}
    assert size_arguments((512, 768), accepts, "A") == {"height": 512, "width": 768}
    assert size_arguments(None, (), "A") == {}


@pytest.mark.parametrize("text", ["512", "512x", "0x512", "-1x512", "axb", "1x2x3x4", ""])
def test_anything_else_is_one_clear_error(text: str, cli: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="expected HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH"):
        parse_size(text)
    done = cli("calibrate", "--size", text, "--dry-run")
    assert done.code == 2
    assert "512x512" in done.err


def test_a_model_that_takes_no_size_says_so(demo: Path, tiny_folder: Path) -> None:
    for folder, message in ((demo, "DiTPipeline samples at a size of its own"), (tiny_folder, "are for a pipeline")):
        sampler = make_sampler(find_source(folder), torch.float32, "cpu")
        with pytest.raises(InputError, match=message):
            sampler.run(Workload(1, 1, size=(32, 32)))
    with pytest.raises(InputError, match="A makes no videos: it takes no num_frames"):
        size_arguments((5, 32, 32), ("height", "width"), "A")


def test_memory_that_runs_out_is_said_with_what_takes_less(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler(find_source(tiny_folder), torch.float32, "cpu")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    monkeypatch.setattr(sampler, "_sample", full)
    with pytest.raises(InputError, match=r"sample 8 at a time \(CUDA out of memory.*20 GiB\.\); --batch-size 2 and"):
        sampler.run(Workload(8, 1))
