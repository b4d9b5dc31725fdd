"""Runs that end early: what is checked before hours are spent, what is kept, and what a resumed run insists on."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vdit_quant.prune.options import Options
from vdit_quant.prune.pipeline import prune_model
from vdit_quant.quantize.errors import InputError

DATA = {"batch_size": 4, "recover": "4", "grids": 0}
FEW = {"samples": 16, "steps": 2, **DATA}


def _plan(path: Path, kept: int) -> str:
    """A plan for the tiny model, both of whose blocks are there to be kept; the first is read by its output layer."""
    stack = {"name": "transformer_blocks", "depth_key": "num_layers", "depth": 2, "kept": [kept]}
    path.write_text(json.dumps({"stacks": [stack]}))
    return str(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"plan": 1}, r"plan\.json: transformer_blocks\.0 cannot be taken out"),
     ({"keep": 1, "groups": ("0:1", "1:1")}, "group 0:1 .* more blocks are pinned than it keeps")],
)  # fmt: skip
def test_blocks_that_must_stay_are_known_before_anything_is_sampled(
    options: dict[str, Any], words: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "plan" in options:
        options = {"plan": _plan(tmp_path / "plan.json", options["plan"])}
    monkeypatch.setattr("vdit_quant.prune.pipeline.generate_latents", None)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=words):
        prune_model(tiny_folder, tmp_path / "here" / "out", **options, **FEW)
    assert not list((tmp_path / "here").iterdir())


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Any]:
    """Context manager: a run raises the given error where its recovery would begin."""

    @contextmanager
    def inside(error: BaseException) -> Iterator[None]:
        def fail(*_: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("vdit_quant.prune.pipeline.recover", fail)
            yield

    return inside


def test_other_contents_of_a_plan_or_of_data_are_not_resumed(
    tiny_folder: Path, tmp_path: Path, failing: Callable[[BaseException], Any]
) -> None:
    (tmp_path / "data").mkdir()
    shard, plan = tmp_path / "data" / "a.safetensors", tmp_path / "plan.json"
    rows = {"latents": torch.ones(4, 4, 8, 8), "class_labels": torch.arange(4)}
    save_file(rows, shard)
    options = {**DATA, "plan": _plan(plan, 0)}
    with failing(RuntimeError("the power is gone")), pytest.raises(RuntimeError, match="power"):
        prune_model(tiny_folder, tmp_path / "out", shard.parent, **options)
    before = shard.read_bytes(), plan.read_bytes()
    save_file({**rows, "class_labels": torch.arange(4) + 1}, shard)
    with pytest.raises(InputError, match=r"--resume: .* other settings \(data\)"):
        prune_model(tiny_folder, tmp_path / "out", shard.parent, **options, resume=True)
    shard.write_bytes(before[0])
    plan = plan.rename(tmp_path / "moved.json")  # the contents count, not where they lie
    options["plan"] = str(plan)
    with failing(RuntimeError("gone again")), pytest.raises(RuntimeError, match="gone again"):
        prune_model(tiny_folder, tmp_path / "out", shard.parent, **options, resume=True, lr=1e-5)
    plan.write_bytes(before[1] + b"\n")
    with pytest.raises(InputError, match=r"--resume: .* other settings \(plan\)"):
        prune_model(tiny_folder, tmp_path / "out", shard.parent, **options, resume=True)


def test_sampled_data_outlives_an_error_and_a_damaged_file_of_it_is_named(
    tiny_folder: Path, tmp_path: Path, failing: Callable[[BaseException], Any], notes: Any
) -> None:
    options = {**FEW, "keep": 1, "criterion": "even", "recover": "0", "progress": notes}
    with failing(InputError("not today")), pytest.raises(InputError, match="not today"):
        prune_model(tiny_folder, tmp_path / "out", **options)
    assert "--resume" in notes.lines[-1]
    (shard,) = (tmp_path / ".out.partial" / "latents").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"{shard.name}: .* delete it"):
        prune_model(tiny_folder, tmp_path / "out", **options, resume=True)
    shard.unlink()
    assert prune_model(tiny_folder, tmp_path / "out", **options, resume=True).is_dir()


def test_an_interruption_says_what_is_kept_and_a_new_run_what_it_drops(
    tiny_folder: Path, tmp_path: Path, failing: Callable[[BaseException], Any], notes: Any
) -> None:
    options = {**FEW, "keep": 1, "criterion": "even", "recover": "0", "progress": notes}
    folder = tmp_path / ".out.partial"
    with failing(KeyboardInterrupt()), pytest.raises(KeyboardInterrupt, match="--resume goes on") as stop:
        prune_model(tiny_folder, tmp_path / "out", **options)
    assert str(folder) in str(stop.value)
    with failing(KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        prune_model(tiny_folder, tmp_path / "out", **options)
    assert notes.lines == [
        "starting anew: 2 finished part(s) of an interrupted run are dropped; --resume would have gone on"
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"plan": "p.json", "criterion": "even"}, "--plan and --criterion: .* not both"),
     ({"plan": "p.json", "groups": ("1:2",)}, "--plan and --group: .* not both"),
     ({"plan": "p.json", "search": "50"}, "--plan and --search: .* not both"),
     ({"criterion": "even", "groups": ("1:2",)}, "--group needs --criterion learned"),
     ({"criterion": "even", "search": "50"}, "--search needs --criterion learned"),
     ({"search": "0"}, "--search: expected a positive number .*, found 0")],
)  # fmt: skip
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Options(**options).check()


def test_defaults_may_be_given() -> None:
    Options(plan="p.json", criterion="learned", groups=(), search="60s").check()
    Options(criterion="even", groups=(), search="60s").check()
