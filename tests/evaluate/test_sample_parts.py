"""A comparison's samples in parts: the same numbers, a few samples in memory, and no file left."""

import logging
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vdit_quant
from vdit_quant.evaluate import sample_parts, sampling
from vdit_quant.evaluate.compare import Comparison, measure
from vdit_quant.evaluate.conditions import Conditions
from vdit_quant.evaluate.metrics import mean_psnr, relative_error, ssim
from vdit_quant.evaluate.pairing import digest_conditions
from vdit_quant.evaluate.sample_parts import SeedSamples, keep_parts
from vdit_quant.evaluate.sampling import Samples, Workload, join_samples
from vdit_quant.quantize.errors import InputError, OutputError

WORKLOAD = Workload(samples=6, steps=3, batch_size=1)
SEEDS = (1, 2)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of every batch."""
    monkeypatch.setattr(sample_parts, "PART_BYTES", 1)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file of samples, as it is written."""
    paths: list[Path] = []
    save = sample_parts.save_file
    monkeypatch.setattr(sample_parts, "save_file", lambda tensors, path: (save(tensors, path), paths.append(path)))
    return paths


def _batches(seed: int, images: bool) -> list[Samples]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 16, 16) if images else (4, 8, 8)
    draw = torch.rand if images else torch.randn
    return [
        Samples(draw(n, *shape, generator=generator), [torch.randn(n, 4, 2, 2, generator=generator) for _ in range(3)])
        for n in (3, 3, 1)
    ]


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("limit", [1, 10**9])
def test_the_metrics_are_those_of_all_samples_at_once(
    images: bool, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_parts, "PART_BYTES", limit)
    got, want = (_batches(seed, images) for seed in (1, 2))
    found = measure(5, *(SeedSamples(keep_parts(side, tmp_path), "", None) for side in (got, want)))
    a, b = map(join_samples, (got, want))
    span = 1.0 if images else float(b.images.max() - b.images.min())
    close: Callable[[Any], Any] = (
        (lambda value: value) if limit > 1 else (lambda value: pytest.approx(value, rel=1e-14))
    )
    assert found.psnr == close(mean_psnr(a.images, b.images, span))
    assert found.latent_error == close(relative_error(a.images, b.images))
    assert found.step_error == close(tuple(map(relative_error, a.trajectory, b.trajectory)))
    if images:
        assert found.ssim == float(ssim(a.images, b.images).mean())
    assert len(list(tmp_path.iterdir())) == (6 if limit == 1 else 2)


def test_a_relative_error_is_the_root_of_a_ratio_of_means() -> None:
    got, want = (torch.randn(3, 5, 7).double() for _ in range(2))
    expected = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
    assert relative_error(got, want) == expected


@pytest.mark.parametrize("count", [1, 2, 4, 6, 7, 9])
def test_the_first_images_are_taken_from_as_many_parts_as_it_needs(
    count: int, tmp_path: Path, tiny_parts: None
) -> None:
    batches = _batches(1, True)
    kept = SeedSamples(keep_parts(batches, tmp_path), "", None)
    assert torch.equal(kept.first_images(count), join_samples(batches).images[:count])


@pytest.fixture
def small_pair(demo: Path, demo_artifact: Callable[..., Path]) -> tuple[Path, Path]:
    return demo_artifact("w4a8"), demo


def _compare(pair: tuple[Path, Path], **given: Any) -> Comparison:
    return vdit_quant.compare(*pair, WORKLOAD, SEEDS, "cpu", **given)


def test_few_samples_are_in_memory_at_once(
    small_pair: tuple[Path, Path], tiny_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most = 0, 0

    def forget(count: int) -> None:
        nonlocal alive
        alive -= count

    class Counted(Samples):
        def __init__(self, images: torch.Tensor, *rest: Any) -> None:
            nonlocal alive, most
            super().__init__(images, *rest)
            alive += len(images)
            most = max(most, alive)
            weakref.finalize(images.untyped_storage(), forget, len(images))

    for module in (sampling, sample_parts):
        monkeypatch.setattr(module, "Samples", Counted)
    _compare(small_pair)
    assert 2 <= most <= 4, "a pair being measured while the next is read; of 24 samples"
    assert alive == 0


def test_files_lie_beside_the_result_and_go_with_the_end(
    small_pair: tuple[Path, Path], written: list[Path], temporary: Path, tmp_path: Path
) -> None:
    picture, record = tmp_path / "out" / "samples.png", tmp_path / "out" / "comparison.json"
    result = _compare(small_pair, picture=picture, record=record)
    assert {path.parent.parent for path in written} == {tmp_path / "out"}
    assert len(written) == 2 * len(SEEDS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.json", "samples.png"]
    assert _compare(small_pair).seeds == result.seeds
    assert written[-1].parent.parent == temporary
    assert not list(temporary.iterdir())


def test_files_go_after_an_error(
    small_pair: tuple[Path, Path],
    written: list[Path],
    temporary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vdit_quant.evaluate.compare.save_pairs", fail)
    with pytest.raises(OutputError, match="No space left"):
        _compare(small_pair, picture=tmp_path / "out" / "samples.png")
    assert written
    assert not list((tmp_path / "out").iterdir())
    written.clear()

    def interrupt(label: str, done: int, _total: int) -> None:
        if label == "baseline, seed 2" and done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _compare(small_pair, progress=interrupt)
    assert len(written) == 3
    assert not list(temporary.iterdir())


def test_samples_stay_in_memory_where_the_disk_has_no_room(
    small_pair: tuple[Path, Path],
    written: list[Path],
    tiny_parts: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    want = _compare(small_pair)
    written.clear()
    usage = type("Usage", (), {"free": sample_parts.SPARE_BYTES})
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "vdit_quant"):
        patch.setattr(sample_parts.shutil, "disk_usage", lambda _: usage)
        assert _compare(small_pair, record=tmp_path / "r.json").seeds == want.seeds
    assert not written
    assert len(caplog.messages) == 2 * len(SEEDS)
    assert f"held in memory, there is no room in {tmp_path} (1.0 GB free)" in caplog.messages[0]


def test_a_disk_that_fills_up_on_the_way_costs_no_sample(
    tiny_parts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save = sample_parts.save_file

    def fill(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save(tensors, path)
        if path.name != "0.safetensors":
            raise sample_parts.SafetensorError("No space left on device")

    monkeypatch.setattr(sample_parts, "save_file", fill)
    batches = _batches(1, True)
    kept = SeedSamples(keep_parts(batches, tmp_path), "", None)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]
    found, want = join_samples(list(kept)), join_samples(batches)
    assert torch.equal(found.images, want.images)
    assert all(map(torch.equal, found.trajectory, want.trajectory))


def test_a_folder_that_cannot_be_made_is_done_without(
    small_pair: tuple[Path, Path], written: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    want = _compare(small_pair)
    written.clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert _compare(small_pair).seeds == want.seeds
    assert not written


def test_equal_conditions_have_one_name() -> None:
    def make() -> Conditions:
        states = torch.arange(12, dtype=torch.bfloat16).reshape(2, 3, 2)
        return Conditions({"states": states, "class_labels": torch.tensor([1, 2])}, {"states": states[:1]}, (4, 8, 8))

    given = make()
    assert digest_conditions(given) == digest_conditions(make())
    others = [
        replace(given, unguided=None),
        replace(given, latent_shape=(4, 8, 4)),
        replace(given, guided={**given.guided, "class_labels": torch.tensor([1, 3])}),
        replace(
            given, guided={"states": given.guided["states"].reshape(2, 2, 3), **given.guided, "more": torch.ones(2)}
        ),
    ]
    names = [digest_conditions(other) for other in (given, *others, {"prompt": ["a", "b"]}, {"prompt": ["a", "c"]})]
    assert len(set(names)) == len(names)


def test_a_broken_sample_is_counted_over_all_parts(tiny_parts: None, tmp_path: Path) -> None:
    from vdit_quant.evaluate.compare import Run, compare_runs

    batches = _batches(1, True)
    batches[0].images[1, 0, 0, 0] = batches[2].images[0, 0, 0, 0] = float("nan")
    whole = Run("m", WORKLOAD, (1,), (SeedSamples(keep_parts(batches, tmp_path), "", None),), "", "cpu", "", 1, 1.0)
    with pytest.raises(InputError, match=r"m \(baseline\), seed 1: 2 of 7 samples hold NaN or infinity"):
        compare_runs(whole, whole)
