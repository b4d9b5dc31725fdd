"""Prompts: in an order of the seed, from a file or those that ship, and what is no file of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_quant.calibrate.options import Options
from vdit_quant.evaluate.prompts import pick_prompts, prompts_fingerprint, read_prompts
from vdit_quant.evaluate.sampling import Workload, make_sampler
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.source import find_source


def test_each_prompt_is_used_once_before_any_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("  a red fox \n\nfür Elise\na bowl\n", encoding="utf-8")
    assert read_prompts(path) == ["a red fox", "für Elise", "a bowl"]
    chosen = pick_prompts(str(path), 5, 1)
    assert set(chosen[:3]) == set(read_prompts(path))
    assert chosen[3:] == chosen[:2]
    assert len(set(pick_prompts(None, 48, 0))) == 48


def test_a_comparison_asks_for_nothing_that_a_method_has_learned_from() -> None:
    learned = {prompt for seed in range(3) for prompt in pick_prompts(None, 48, seed, learn=True)}
    assert len(learned) == 48
    assert not learned & set(pick_prompts(None, 48, 1))
    assert Options().workload().learn
    assert not Workload().learn


def test_another_seed_draws_other_prompts() -> None:
    for seed in (0, 1, 2, 1_000_000, 1_000_001):
        drawn = pick_prompts(None, 20, seed)
        assert drawn == pick_prompts(None, 20, seed), "both sides of a comparison ask for the same"
        assert drawn[:8] == pick_prompts(None, 8, seed)
        other = pick_prompts(None, 20, seed + 1)
        assert drawn != other
        assert len({*drawn, *other}) > 26, "more than a few are new"


def test_what_counts_is_what_the_file_asks_for(tmp_path: Path) -> None:
    one, other = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("x\ny\n")
    other.write_text("x\r\n\r\ny")
    assert prompts_fingerprint(one) == prompts_fingerprint(other)
    assert Workload(prompts=str(one)).to_dict() == Workload(prompts=str(other)).to_dict()
    other.write_bytes(b"\xef\xbb\xbfx\ny\n")  # as some editors begin a file
    assert prompts_fingerprint(one) == prompts_fingerprint(other)
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
