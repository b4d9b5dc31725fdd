"""Prompts: in turn, from a file or those that ship, and what is no file of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_quant.evaluate.prompts import pick_prompts, prompts_fingerprint, read_prompts
from vdit_quant.evaluate.sampling import Workload, make_sampler
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.source import find_source


def test_prompts_are_taken_in_turn_from_the_seed_on(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("  a red fox \n\nfür Elise\na bowl\n", encoding="utf-8")
    assert read_prompts(path) == ["a red fox", "für Elise", "a bowl"]
    assert pick_prompts(str(path), 4, 1) == ["für Elise", "a bowl", "a red fox", "für Elise"]
    shipped = pick_prompts(None, 48, 0)
    assert len(set(shipped)) == 48
    assert pick_prompts(None, 2, 47) == [shipped[47], shipped[0]]


def test_what_counts_is_what_the_file_asks_for(tmp_path: Path) -> None:
    one, other = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("x\ny\n")
    other.write_text("x\r\n\r\ny")
    assert prompts_fingerprint(one) == prompts_fingerprint(other)
    assert Workload(prompts=str(one)).to_dict() == Workload(prompts=str(other)).to_dict()
    other.write_text("y\nx\n")
    assert prompts_fingerprint(one) != prompts_fingerprint(other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file"),
        (b"\n \n", "no prompts; expected one on"),
        (b"\xff\xfe\x00", "UTF-8 text"),
    ],
)
def test_another_file_is_one_clear_error(
    content: bytes | None, message: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(path)
    done = cli("calibrate", "--prompts", path)
    assert done.code == 2
    assert str(path) in done.err.replace("\n", "")


def test_a_model_without_text_says_so(demo: Path, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a fox")
    for folder, message in ((demo, "DiTPipeline takes no prompt"), (tiny_folder, "are for a pipeline")):
        sampler = make_sampler(find_source(folder), torch.float32, "cpu")
        with pytest.raises(InputError, match=message):
            sampler.run(Workload(1, 1, prompts=str(path)))
