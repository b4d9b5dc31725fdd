"""Pruning from a checkpoint to a checkpoint: what is written, that recovery helps, and that the result is an ordinary
model for every other command."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from vdit_quant.prune.pipeline import prune_model
from vdit_quant.prune.writer import read_record
from vdit_quant.quantize.errors import InputError, OutputError
from vdit_quant.runtime.artifact import read_config
from vdit_quant.runtime.checkpoint import WEIGHTS
from vdit_quant.runtime.family import find_family
from vdit_quant.runtime.source import find_source, load_transformer

PLOT = {"prune.png"} if find_spec("matplotlib") else set()
SCHEDULERS = {
    "wan": FlowMatchEulerDiscreteScheduler,
    "flux": FlowMatchEulerDiscreteScheduler,
    "cogvideox": CogVideoXDDIMScheduler,
}
DATA = {"batch_size": 4, "recover": "4", "grids": 0}
FEW = {"samples": 16, "steps": 2, **DATA}


KILLED = """
import os, signal, sys
from vdit_quant.prune.trainer import Trainer
from vdit_quant.cli.main import main

stage, step = sys.argv[1], int(sys.argv[2])
original = Trainer._train

def dying(self):
    if self.stage == stage and self.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self)

Trainer._train = dying
sys.argv = ["vdit-quant", *sys.argv[3:]]
main()
"""


KILLED_AT = {"search": 3, "recovery": 25}


@pytest.fixture(scope="module", autouse=True)
def killed(
    demo: Path,
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> Iterator[dict[str, Any]]:
    """Stage -> (run that is killed in that stage, its folder, model, settings). They start with the file's first test:
    a process takes seconds to import everything, and the other tests need not wait for it.

    The recovery is that of a trained model; in the search, whose steps cost more, the smallest model does.
    """
    cases = {"search": (tiny_folder, 1, 4), "recovery": (demo, 4, 30)}
    with ThreadPoolExecutor(max_workers=1) as pool:
        found = {}
        for stage, (model, keep, steps) in cases.items():
            folder, few = tmp_path_factory.mktemp(stage), {**FEW, "samples": 8, "batch_size": 2}
            options = {"keep": keep, **few, "search": "5", "recover": str(steps), "save_steps": 10}
            options["device"] = "cpu"  # as in the processes that are killed, which see no GPU
            program = ("-c", KILLED, stage, str(KILLED_AT[stage]), *_line(model, options))
            found[stage] = (pool.submit(python, *program, cwd=folder), folder, model, options)
        yield found


def _line(model: Path, options: dict[str, Any]) -> list[str]:
    words = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["prune", str(model), "-o", "out", *words]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with four of its eight blocks, searched by the clock and recovered by steps, so that how much is learned
    does not depend on the machine: read it, do not write it."""
    folder = tmp_path_factory.mktemp("pruned") / "digits-d4"
    options = {"samples": 32, "steps": 5, "batch_size": 4, "grids": 1, "seed": 1}
    return prune_model(None, folder, keep="4", search="1s", recover="40", **options)


def test_recovery_improves_on_no_recovery(pruned: Path) -> None:
    losses = read_record(pruned)["losses"]
    assert losses["recovered"]["output"] < 0.6 * losses["pruned"]["output"]
    assert losses["recovered"]["diffusion"] < losses["pruned"]["diffusion"]
    assert losses["teacher"]["output"] == 0
    assert losses["teacher"]["diffusion"] < losses["recovered"]["diffusion"]


def test_the_result_is_an_ordinary_pipeline(pruned: Path, demo: Path) -> None:
    import diffusers

    pipe = diffusers.DiTPipeline.from_pretrained(pruned)
    assert len(pipe.transformer.transformer_blocks) == pipe.transformer.config.num_layers == 4
    want, got = (json.loads((folder / "transformer" / "config.json").read_text()) for folder in (demo, pruned))
    assert got == {**want, "num_layers": 4}
    before, after = (load_file(folder / "transformer" / WEIGHTS) for folder in (demo, pruned))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert set(after) == {
        name for name in before if not name.startswith(tuple(f"transformer_blocks.{i}." for i in range(4, 8)))
    }
    assert (pruned / "vae" / WEIGHTS).read_bytes() == (demo / "vae" / WEIGHTS).read_bytes()
    assert {path.name for path in pruned.glob("*.png")} >= PLOT
    assert len(list(pruned.glob("samples-*.png"))) == 1
    assert not list(pruned.parent.glob(".*")), "something was left behind"


def test_the_sidecar_says_how_it_came_about(pruned: Path) -> None:
    record = read_record(pruned)
    (stack,) = record["plan"]["stacks"]
    assert len(stack["kept"]) == 4
    assert record["plan"]["criterion"] == "learned"
    assert record["recovered"] is True
    assert record["source"] == "demo"
    assert record["settings"]["seed"] == 1
    assert record["log"]["recovery"][-1]["step"] == 40
    for log in record["log"].values():
        assert log[-1]["step"] >= 10
        assert log[-1]["seconds"] > 0
        assert all({"loss", "output", "lr", "norm"} <= set(entry) for entry in log)


def test_pruned_calibrated_compared_in_three_commands(cli: Callable[..., Any]) -> None:
    few = ("--samples", "16", "--steps", "2", "--batch-size", "4", "--search", "3", "--recover", "4", "--grids", "0")
    done = cli("prune", "--keep", "3", "demo", "-o", "d3", *few)
    assert done.code == 0, done.err
    assert "right after pruning" in done.out
    assert "recovered" in done.out
    assert "kept" in done.out
    done = cli("calibrate", "d3", "--bits", "w4a8", "-o", "d3-w4a8", "--steps", "3", "--samples", "2")
    assert done.code == 0, done.err
    sampled = ("--steps", "3", "--samples", "2", "--seed", "1")
    done = cli("compare", "d3-w4a8", *sampled, "-o", "report")
    assert done.code == 0, done.err
    report = json.loads(Path("report/comparison.json").read_text())
    assert report["baseline"] == "d3"
    assert 10 < report["psnr"] < 80
    record, whole = read_config(Path("d3-w4a8/transformer")).provenance["pruned"], read_record("d3")
    assert record["plan"] == whole["plan"]
    assert record["source"] == "demo"
    assert "log" not in record
    done = cli("compare", "d3-w4a8", "--baseline", "demo", *sampled, "-o", "both")
    assert done.code == 0, done.err
    both = json.loads(Path("both/comparison.json").read_text())
    assert both["psnr"] < report["psnr"], "what was pruned away cost nothing"
    assert both["bytes_baseline"] > report["bytes_baseline"]


def test_a_pruned_model_is_compared_with_its_teacher(pruned: Path, cli: Callable[..., Any]) -> None:
    sampled = ("--steps", "3", "--samples", "2", "--seed", "1")
    done = cli("compare", pruned, *sampled, "-o", "report")
    assert done.code == 0, done.err
    report = json.loads(Path("report/comparison.json").read_text())
    assert report["baseline"] == "demo"
    assert report["seeds"][0]["step_error"][0] == 0, "the two runs did not begin with the same noise"
    assert 0.3 < report["bytes_artifact"] / report["bytes_baseline"] < 0.7


def test_without_recovery_it_is_called_an_initialisation(cli: Callable[..., Any], demo: Path) -> None:
    done = cli(
        "prune", "--keep", "5", "-o", "d5", "--criterion", "even", "--recover", "0", "--samples", "8", "--steps", "1"
    )
    assert done.code == 0, done.err
    assert done.out.count("this is an initialisation") == 2
    record = read_record("d5")
    assert record["recovered"] is False
    assert set(record["losses"]) == {"teacher", "pruned"}
    kept = record["plan"]["stacks"][0]["kept"]
    before, after = (load_file(folder / "transformer" / WEIGHTS) for folder in (demo, Path("d5")))
    for new, old in enumerate(kept):
        name = "ff.net.2.weight"
        assert torch.equal(after[f"transformer_blocks.{new}.{name}"], before[f"transformer_blocks.{old}.{name}"])


def test_a_bare_transformer_gives_a_bare_transformer(tiny_folder: Path, tmp_path: Path) -> None:
    target = prune_model(tiny_folder, tmp_path / "one", keep=1, criterion="magnitude", **FEW)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", WEIGHTS, "prune.json", *PLOT]
    assert len(load_transformer(find_source(target), torch.float32).transformer_blocks) == 1


def test_the_scheduler_beside_a_bare_transformer_comes_along(
    tiny_folder: Path, demo: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    scheduler = copy_of(demo / "scheduler")
    target = prune_model(copy_of(tiny_folder), tmp_path / "one", keep=1, criterion="even", **{**FEW, "recover": "0"})
    found = find_source(target).scheduler
    assert found == target / "scheduler"
    assert {p.name: p.read_bytes() for p in found.iterdir()} == {p.name: p.read_bytes() for p in scheduler.iterdir()}


def test_data_of_the_users_own_is_what_is_learned_from(tiny_folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {"latents": torch.randn(12, 4, 8, 8, generator=generator), "class_labels": torch.arange(12) % 10}
    (tmp_path / "data").mkdir()
    save_file(rows, tmp_path / "data" / "a.safetensors")
    few = {**DATA, "keep": 1, "criterion": "even", "seed": 3}
    batches = [{name: t[:5] for name, t in rows.items()}, {name: t[5:] for name, t in rows.items()}]
    folders = [
        prune_model(tiny_folder, tmp_path / f"out-{i}", data, **few)
        for i, data in enumerate((tmp_path / "data", batches))
    ]
    first, second = (load_file(folder / WEIGHTS) for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    log = read_record(folders[0])["log"]["recovery"]
    assert "diffusion" in log[0], "with data of one's own a part of the loss is the data's"
    own = prune_model(tiny_folder, tmp_path / "own", samples=16, steps=2, **few)
    assert any(not torch.equal(first[name], t) for name, t in load_file(own / WEIGHTS).items())


@pytest.mark.parametrize("criterion", ["learned", "block_influence", "relative_error"])
def test_every_family_is_pruned_and_recovers(
    criterion: str, named_model: tuple[str, Any], call: Callable[..., Any], tmp_path: Path
) -> None:
    name, model = named_model
    model.save_pretrained(tmp_path / "whole")
    data = {key: t for key, t in call(name, 12).items() if key != "timestep"}
    data["latents"] = data.pop("hidden_states")
    data |= {key: data[key].expand(12, *data[key].shape) for key in find_family(model).shared if key in data}
    keep, few = (
        (2, 3) if name == "flux" else (2,),
        {**DATA, "recover": "2", **({"search": "2"} if criterion == "learned" else {})},
    )
    if name in SCHEDULERS:
        SCHEDULERS[name]().save_pretrained(tmp_path / "scheduler")
    target = prune_model(
        tmp_path / "whole", tmp_path / "out", [data], keep=",".join(map(str, keep)), criterion=criterion, **few
    )
    stacks = read_record(target)["plan"]["stacks"]
    student = load_transformer(find_source(target), torch.float32)
    for stack, count in zip(stacks, keep, strict=True):
        assert len(stack["kept"]) == len(student.get_submodule(stack["name"])) == count
    assert all(t.isfinite().all() for t in load_file(target / WEIGHTS).values())


def test_a_plan_of_an_earlier_run_can_be_used(pruned: Path, tmp_path: Path) -> None:
    plan = pruned / "transformer" / "prune.json"
    again = prune_model(None, tmp_path / "again", plan=str(plan), recover="0", samples=8, steps=1)
    stacks = read_record(again)["plan"]["stacks"]
    assert stacks == read_record(pruned)["plan"]["stacks"]
    with pytest.raises(InputError, match="keeps 4"):
        prune_model(None, tmp_path / "other", plan=str(plan), keep="5")


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("stage", KILLED_AT)
def test_a_killed_run_resumes_to_the_same_bits(
    stage: str, killed: dict[str, Any], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, folder, model, options = killed[stage]
    want = prune_model(model, folder / "whole", **options)
    assert process.result().returncode == -signal.SIGKILL, process.result().stderr
    monkeypatch.chdir(folder)
    assert not Path("out").exists()
    result = cli(*_line(model, options), "--resume")
    assert result.code == 0, result.err
    assert "resuming" in result.out
    assert ("search (5)" in result.out) == (stage == "search"), "finished work was done again"
    inside = want.joinpath("transformer") if stage == "recovery" else want
    for path in (inside / WEIGHTS, inside / "config.json"):
        assert (Path("out") / path.relative_to(want)).read_bytes() == path.read_bytes()
    ours, theirs = read_record("out"), read_record(want)
    assert ours["plan"] == theirs["plan"]
    assert ours["losses"] == theirs["losses"]


REFUSED = {
    "nothing to keep": ((), ("--keep N is needed", "8 transformer_blocks")),
    "too many": (("--keep", "9"), ("expected 1 to 8 blocks",)),
    "a criterion that does not exist": (("--keep", "4", "--criterion", "magnitute"), ("did you mean 'magnitude'",)),
    "no budget": (("--keep", "4", "--recover", "soon"), ("--recover 'soon'", "such as 3000, 90s, 8min")),
    "no such data": (("--keep", "4", "--data", "nowhere"), ("nowhere", "found none")),
    "groups that do not add up": (("--keep", "4", "--group", "1:4"), ("keep 2 of 8",)),
    "an optimiser that is not here": (("--keep", "4", "--optimizer", "adamw4bit"), ("adamw8bit",)),
    "a weight above 1": (("--keep", "4", "--output-weight", "3"), ("--output-weight 3.0", "expected 0 to 1")),
    "a rate below 0": (("--keep", "4", "--lr", "-1"), ("--lr -1.0", "above 0")),
    "a seed without end": (("--keep", "4", "--seed", "99999999999999"), ("--seed", "expected 0 to 4294967295")),
    "no such plan": (("--plan", "plan.json"), ("plan.json", "no such file")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case: str, cli: Callable[..., Any]) -> None:
    arguments, words = REFUSED[case]
    done = cli("prune", *arguments, "-o", "out")
    assert done.code == 2, done.out
    assert len(done.err.strip().splitlines()) == 1
    assert all(word in done.err for word in words), done.err
    assert not list(Path().iterdir()), "something was left behind"


def test_what_was_not_written_here_is_not_replaced(cli: Callable[..., Any], tiny_artifact: Path) -> None:
    Path("out").mkdir()
    (Path("out") / "thesis.txt").write_text("all of it")
    done = cli("prune", "--keep", "4", "-o", "out", "--overwrite")
    assert done.code == 2
    assert "replaces nothing else" in done.err
    done = cli("prune", tiny_artifact, "--keep", "1", "-o", "other")
    assert done.code == 2
    assert "prune first, then calibrate" in done.err


def test_a_dry_run_shows_what_would_be_done(cli: Callable[..., Any]) -> None:
    done = cli("prune", "--keep", "4", "--dry-run")
    assert done.code == 0, done.err
    for words in ("demo-d4", "groups 1:2 1:2 1:2 1:2", "samples of the teacher", "480 s", "transformer_blocks"):
        assert words in done.out
    assert not list(Path().iterdir())


def test_a_dry_run_says_that_the_output_would_be_refused(cli: Callable[..., Any]) -> None:
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("mine")
    done = cli("prune", "--keep", "4", "--dry-run", "-o", "taken")
    assert done.code == 0, done.err
    assert "groups 1:2 1:2 1:2 1:2" in done.out
    assert "without --dry-run refused: " in done.out
    assert "taken" in done.out
    assert cli("prune", "--keep", "4", "-o", "taken").code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 77}, "--samples changes nothing beside --data"),
        ({"guidance": 7.0}, "--guidance changes nothing beside --data"),
        ({"cache": "nowhere"}, "--cache changes nothing beside --data"),
        ({"distill": "none", "features": 3.0}, "--features changes nothing beside --distill none"),
        ({"distill": "output", "mask": 3.0}, "--mask changes nothing beside --distill output"),
    ],
)
def test_an_option_that_changes_nothing_is_refused(options: dict[str, Any], words: str, tiny_folder: Path) -> None:
    data = [{"latents": torch.randn(12, 4, 8, 8), "class_labels": torch.arange(12) % 10}]
    with pytest.raises(InputError, match=words):
        prune_model(tiny_folder, "out", data, keep=1, criterion="even", **{**DATA, **options})


def test_checkpointing_is_refused_before_the_search(named_model: tuple[str, Any], tmp_path: Path) -> None:
    name, model = named_model
    if name != "large_dit":
        assert model._supports_gradient_checkpointing
        return
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(InputError, match="--checkpointing: LargeDiT does not support it"):
        prune_model(tmp_path / "whole", tmp_path / "out", keep=1, checkpointing=True)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_picture_that_does_not_fit_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        assert list(tmp_path.rglob("recovery.safetensors")), "the steps so far are not saved"
        raise OutputError("no memory to sample 8 at a time")

    monkeypatch.setattr("vdit_quant.prune.recover.Grid.draw", full)
    few = {**FEW, "samples": 8, "grids": 2, "keep": "5", "criterion": "even"}
    target = prune_model(None, tmp_path / "out", **few)
    assert len(read_record(target)["log"]["recovery"]) == 4
