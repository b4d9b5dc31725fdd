from contextlib import suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from vdit_quant.kernels import dispatch, launch_table, tuning
from vdit_quant.kernels.launch_table import Entry, Table, facts_of, read_table, write_table
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime import tune

pytest.importorskip("triton", reason="triton is not installed")
GPU = torch.device("cuda", 0)
PLACES = {
    "int8_weight_linear": "vdit_quant.kernels.int8_linear",
    "int4_to_int8": "vdit_quant.kernels.int4_linear",
    "int4_weight_linear": "vdit_quant.kernels.int4_linear",
}


@pytest.fixture
def target(monkeypatch, tmp_path: Path) -> Path:
    """A table of a GPU that this machine claims to have, on which the candidate with the most warps is the fastest."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")

    def fastest(task: tuning.Task, device: torch.device):
        best = max(task.candidates, key=lambda options: options.get("num_warps", 0))
        return Entry(task.op, task.m, task.n, task.k, best, task.facts, us=2.0), ""

    monkeypatch.setattr(tuning, "_fastest", fastest)
    return tmp_path / "nvidia-h200.json"


def test_every_tunable_op_gives_candidates_and_an_example() -> None:
    assert "int8_linear" in dispatch.tunable()
    for op in dispatch.tunable():
        twin = dispatch.twin(op)
        found = [twin.candidates(op, m, 4608, 1152) for m in (1, 64, 4096)]
        for options in found:
            # kernels that are split by warps, for one GPU each, say how in options of their own
            assert all(isinstance(one["num_warps"], int) for one in options if "variant" not in one)
            assert len({tuple(sorted(o.items())) for o in options}) == len(options)
        args = twin.example(op, 17, 48, 128, torch.device("cpu"))
        assert getattr(import_module(PLACES.get(op, f"vdit_quant.kernels.{op}")), op)(*args).numel() > 0


def test_shapes_are_parsed_and_bad_ones_named() -> None:
    assert tune.parse_shapes("512x4608x1152, 1X8x16") == [(512, 4608, 1152), (1, 8, 16)]
    for bad in ("512x4608", "axbxc", "0x8x8", ""):
        with pytest.raises(InputError, match="expected MxNxK"):
            tune.parse_shapes(f"1x8x8,{bad}")


def test_shapes_of_a_model_come_from_its_configuration(tiny_folder: Path) -> None:
    shapes = tune.model_shapes(tiny_folder)
    assert {(n, k) for _, n, k in shapes} >= {(64, 64), (256, 64), (64, 256), (384, 64)}
    assert {m for m, _, _ in shapes} == set(tuning.TOKENS)


def test_a_run_merges_and_measures_again_only_when_told(target: Path) -> None:
    first = tune.plan_tuning([(512, 64, 128)], ["int8_linear"], target, False, GPU)
    tune.run_tuning(first, GPU, lambda *_: None)
    again = tune.plan_tuning([(500, 64, 128), (4096, 64, 128)], ["int8_linear"], target, False, GPU)
    assert ([task.m for task in again.tasks], again.kept) == ([4096], 1)
    tune.run_tuning(again, GPU, lambda *_: None)
    assert sorted(e.m for e in read_table(target).rows()) == [512, 4096]
    assert tune.plan_tuning([(512, 64, 128)], ["int8_linear"], target, True, GPU).kept == 0


@pytest.mark.parametrize("m", [1, 64, 512])
@pytest.mark.parametrize("op", dispatch.tunable())
def test_what_is_measured_is_what_runs(op: str, m: int, monkeypatch) -> None:
    """A twin that does not ask the table, or asks it for other facts, would be measured in vain."""
    twin, lookup = dispatch.twin(op), Mock(return_value=None)
    monkeypatch.setattr(launch_table, "lookup", lookup)
    with suppress(Exception):  # no GPU: the launch itself fails
        twin.run(op, *twin.example(op, m, 96, 128, torch.device("cpu")))
    asked = {(call.args[0], call.args[2:], facts_of(call.kwargs)) for call in lookup.call_args_list}
    for task in tuning.plan([(m, 96, 128)], [op]):
        assert (op, (task.m, task.n, task.k), task.facts) in asked


def test_groups_are_part_of_what_a_table_holds(target: Path) -> None:
    plan = tune.plan_tuning([(1, 64, 128), (1, 64, 40)], ["int4_to_int8"], target, False, GPU)
    table = tune.run_tuning(plan, GPU, lambda *_: None)
    assert table.find("int4_to_int8", 1, 64, 128, (("group", 64),)) is not None
    assert table.find("int4_to_int8", 1, 64, 128) is None
    assert read_table(target).find("int4_to_int8", 1, 64, 40, (("group", 0),)) is not None
    again = tune.plan_tuning([(1, 64, 128)], ["int4_to_int8"], target, False, GPU)
    assert (again.tasks, again.kept) == ([], 1)
    old = Table.of("NVIDIA H200", [Entry("int4_to_int8", 1, 64, 128, {"BLOCK": 512, "num_warps": 4})])
    write_table(target, old)  # written before facts were
    assert len(tune.plan_tuning([(1, 64, 128)], ["int4_to_int8"], target, False, GPU).tasks) == 1


def test_an_interrupted_run_keeps_what_it_measured(target: Path) -> None:
    plan = tune.plan_tuning([(512, 64, 128), (4096, 64, 128)], ["int8_linear"], target, False, GPU)

    def interrupt(done: int, total: int, detail: str) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.run_tuning(plan, GPU, interrupt)
    assert [e.m for e in read_table(target).rows()] == [512]


def test_a_table_of_another_gpu_is_not_touched(target: Path) -> None:
    write_table(target, Table.of("NVIDIA B200", []))
    plan = tune.plan_tuning([(512, 64, 128)], ["int8_linear"], target, False, GPU)
    with pytest.raises(InputError, match="it is for NVIDIA B200, this GPU is NVIDIA H200"):
        tune.run_tuning(plan, GPU, lambda *_: None)


def test_an_op_that_cannot_be_tuned_is_named(target: Path) -> None:
    with pytest.raises(InputError, match=r"op 'hadamard' has no launch options to tune; those that do: .*int8_linear"):
        tune.plan_tuning([(512, 64, 128)], ["hadamard"], target, False, GPU)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    target: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").touch()
    plan = tune.plan_tuning([(512, 64, 128)], ["int8_linear"], tmp_path / "file" / "t.json", False, GPU)
    monkeypatch.setattr(tuning, "_fastest", Mock(side_effect=AssertionError("measured")))
    with pytest.raises(InputError, match=r"file.t\.json cannot be written: .*; --output names another"):
        tune.run_tuning(plan, GPU, lambda *_: None)


def test_without_a_folder_for_the_table_the_command_says_so_in_a_line(cli, monkeypatch) -> None:
    monkeypatch.setenv("VDIT_LAUNCH_TABLES", "x" * 300)
    refused = cli("tune", "--shapes", "512x64x128", "--dry-run")
    assert (refused.code, refused.out) == (2, "")
    assert "File name too long; --output names another" in " ".join(refused.err.split())
    monkeypatch.delenv("VDIT_LAUNCH_TABLES")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    refused = cli("tune", "--shapes", "512x64x128", "--dry-run")
    assert (refused.code, refused.out) == (2, "")
    assert "no home directory for launch tables: name a folder in VDIT_LAUNCH_TABLES" in refused.err


def test_the_command_lists_and_refuses(cli, monkeypatch) -> None:
    shown = cli("tune", "--shapes", "512x64x128", "--dry-run")
    assert shown.code == 0
    assert "int8_linear 512x64x128: " in shown.out
    assert "candidates, about" in shown.out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = cli("tune", "--shapes", "512x64x128")
    assert (refused.code, refused.out) == (2, "")
    assert "tuning measures on a GPU, and none runs the kernels here: no GPU is visible to torch" in refused.err
