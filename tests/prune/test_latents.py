"""Training data: shards, iterables, and what a teacher samples by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from vdit_quant.prune.generate import Generation, generate_latents, is_complete
from vdit_quant.prune.latents import Latents, collect_latents, read_latents
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.families.dit import FAMILY

SIZES = (3, 5, 2)


def _shards() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"latents": torch.randn(n, 4, 8, 8, generator=generator), "class_labels": torch.arange(n) + 10 * i}
        for i, n in enumerate(SIZES)
    ]


def _write(folder: Path, shards: list[dict[str, torch.Tensor]]) -> Path:
    folder.mkdir()
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"shard-{number}.safetensors")
    return folder


def test_rows_come_from_every_shard(dit: Any, tmp_path: Path) -> None:
    shards = _shards()
    found = read_latents(_write(tmp_path / "data", shards), dit, FAMILY)
    assert len(found) == 10
    assert found.shape == (4, 8, 8)
    assert found.arguments == ("class_labels",)
    assert found.unguided["class_labels"].tolist() == [1000]
    index = torch.tensor([9, 0, 3, 7, 2, 8])
    everything = {name: torch.cat([s[name] for s in shards]) for name in shards[0]}
    for latents in (found, found.resident(torch.device("cpu")), collect_latents(shards, dit, FAMILY)):
        rows = latents.rows(index)
        assert all(torch.equal(rows[name], tensor[index]) for name, tensor in everything.items())


@pytest.mark.parametrize("held_out", [1, 2, 4, 9])
def test_a_held_out_part_is_not_trained_on(held_out: int, dit: Any) -> None:
    latents = collect_latents(_shards(), dit, FAMILY)
    trained, held = latents.split(held_out)
    assert (len(trained), len(held)) == (10 - held_out, held_out)
    parts = [trained.rows(torch.arange(len(trained))), held.rows(torch.arange(len(held)))]
    whole = latents.rows(torch.arange(10))
    order = torch.cat([part["class_labels"] for part in parts]).argsort()  # no label is there twice
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts])[order], tensor)
    again = latents.split(held_out)
    assert all(torch.equal(p[n], q[n]) for x, y in zip((trained, held), again, strict=True)
               for p, q in zip(x.parts, y.parts, strict=True) for n in p)  # fmt: skip


def test_whatever_order_data_has_what_is_held_out_shows_all_of_it() -> None:
    sorted_, repeated = torch.arange(1000) // 100, torch.arange(1000) % 8
    for labels in (sorted_, repeated):
        one, other = labels.split([370, 630])
        shards = tuple({"latents": torch.zeros(len(part), 1), "class_labels": part} for part in (one, other))
        trained, held = Latents(shards, {}).split(125)
        for part in (trained, held):
            found = torch.cat([p["class_labels"] for p in part.parts])
            assert torch.equal(found.unique(), labels.unique())


def test_unguided_conditions_can_be_given(dit: Any, tmp_path: Path) -> None:
    shards = _shards()
    shards[0]["uncond.class_labels"] = torch.tensor([7])
    shards[1]["class_labels"][0] = 1000  # no class
    assert read_latents(_write(tmp_path / "data", shards), dit, FAMILY).unguided["class_labels"].tolist() == [7]


def _drop(key: str) -> Callable[[list[dict[str, torch.Tensor]]], None]:
    return lambda shards: shards[1].__delitem__(key) or None


BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no latents": (_drop("latents"), "no tensor 'latents'"),
    "no labels": (_drop("class_labels"), "expected class_labels, latents as in the first shard"),
    "labels short": (lambda s: s[2].update(class_labels=torch.zeros(1).long()), "2 latents but 1 class_labels"),
    "another shape": (lambda s: s[1].update(latents=torch.randn(5, 4, 6, 6)), r"\[5, 4, 6, 6\], in the first shard"),
    "not the model's": (
        lambda s: [x.update(latents=x["latents"][:, :2].contiguous()) for x in s],
        r"expected \[n, 4, 8, 8\]",
    ),
    "nan": (lambda s: s[1]["latents"][3].fill_(float("nan")), "sample 3 holds NaN"),
    "integers": (lambda s: s[0].update(latents=torch.zeros(3, 4, 8, 8).long()), "expected floating point"),
    "labels of two": (
        lambda s: [x.update(class_labels=x["class_labels"][:, None]) for x in s],
        "class_labels: expected",
    ),
    "a label of no class": (
        lambda s: s[1].update(class_labels=torch.full((5,), 5000)),
        r"shard-1\.safetensors: class_labels: expected int64 labels from 0 to 1000 .* 5000",
    ),
    "labels of no number": (lambda s: s[0].update(class_labels=torch.zeros(3)), "class_labels: expected int64"),
    "an argument of no model": (
        lambda s: [x.update(index=x["class_labels"] + 1) for x in s],
        "unknown condition 'index'",
    ),
    "unguided alone": (lambda s: s[1].update({"uncond.labels": torch.zeros(1).long()}), "uncond.labels without labels"),
    "unguided of two": (
        lambda s: s[1].update({"uncond.class_labels": torch.zeros(1, 2).long()}),
        r"uncond.class_labels: expected \[1\] or \[5\], found \[1, 2\]",
    ),
    "no labels at all": (lambda s: [x.pop("class_labels") for x in s], "needs 'class_labels'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_shards_are_refused_by_name(case: str, dit: Any, tmp_path: Path) -> None:
    change, words = BROKEN[case]
    shards = _shards()
    change(shards)
    with pytest.raises(InputError, match=words) as error:
        read_latents(_write(tmp_path / "data", shards), dit, FAMILY)
    assert "shard-" in str(error.value)


def test_other_data_is_refused(dit: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="found none"):
        read_latents(tmp_path / "data", dit, FAMILY)
    (tmp_path / "data" / "a.safetensors").write_bytes(b"something else")
    with pytest.raises(InputError, match=r"a\.safetensors: expected latents as safetensors"):
        read_latents(tmp_path / "data", dit, FAMILY)
    with pytest.raises(InputError, match="no batch"):
        collect_latents([], dit, FAMILY)
    with pytest.raises(InputError, match="batch 0 of the data: expected a mapping of tensors"):
        collect_latents([torch.zeros(3)], dit, FAMILY)  # type: ignore[list-item]


@pytest.fixture
def sampled(dit: Any, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "data", progress: Any = None, **options: Any) -> Path:
        from vdit_quant.calibrate.progress import Progress

        scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
        settings = Generation(**{"samples": 7, "steps": 2, "batch_size": 3, **options})
        return generate_latents(dit, scheduler, settings, tmp_path / name, "a teacher", progress or Progress())

    return make


def test_a_teacher_samples_its_own_data(sampled: Callable[..., Path], dit: Any) -> None:
    folder = sampled()
    found = read_latents(folder, dit, FAMILY)
    assert len(found) == 7
    assert is_complete(folder)
    assert found.unguided["class_labels"].tolist() == [1000]
    again = read_latents(sampled("again", batch_size=7), dit, FAMILY)
    for name in ("latents", "class_labels"):  # a sample depends on its number, not on its batch
        got, want = (torch.cat([part[name] for part in latents.parts]) for latents in (again, found))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    guided = read_latents(sampled("guided", guidance=3.0), dit, FAMILY)
    assert not torch.allclose(guided.parts[0]["latents"], found.parts[0]["latents"], atol=1e-3)


def test_an_interrupted_sampling_goes_on(sampled: Callable[..., Path]) -> None:
    folder = sampled()
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    (folder / "latents-00001.safetensors").unlink()
    kept = (folder / "latents-00000.safetensors").stat().st_mtime_ns
    assert not is_complete(folder)
    sampled()
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before
    assert (folder / "latents-00000.safetensors").stat().st_mtime_ns == kept


def test_every_step_of_a_batch_is_reported(sampled: Callable[..., Path]) -> None:
    progress = Mock()
    sampled(progress=progress, samples=5, batch_size=3, steps=4)
    assert progress.stage.call_args.args[1] == 8
    assert [call.args[0] for call in progress.advance.call_args_list] == [*range(1, 9), 8]


def test_a_cache_of_other_settings_is_not_used(sampled: Callable[..., Path], tmp_path: Path) -> None:
    folder = sampled()
    with pytest.raises(InputError, match=r"other settings \(guidance, samples\)"):
        sampled(guidance=2.0, samples=9)
    assert json.loads((folder / "generated.json").read_text())["samples"] == 7
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    sampled(batch_size=5)  # as another machine would sample it: what is there is used
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="not empty"):
        sampled("mine")


def test_rows_can_be_loaded_anywhere(sampled: Callable[..., Path]) -> None:
    tensors = load_file(sampled() / "latents-00000.safetensors")
    assert set(tensors) == {"latents", "class_labels", "uncond.class_labels"}
    assert isinstance(Latents(({"latents": tensors["latents"]},), {}), Latents)
