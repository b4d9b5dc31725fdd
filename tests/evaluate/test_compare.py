"""An artifact against full precision: the same conditions and noise, so that the difference is compression alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import vdit_quant
from vdit_quant.evaluate.compare import Comparison, measure, stored_bytes
from vdit_quant.evaluate.offload import BlockStream
from vdit_quant.evaluate.pairing import check_pair, check_same, digest_conditions
from vdit_quant.evaluate.sample_parts import SeedSamples
from vdit_quant.evaluate.sampling import Samples, Workload, make_sampler
from vdit_quant.quantize.errors import InputError, OutputError
from vdit_quant.runtime.source import find_source, load_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
WORKLOAD = Workload(samples=4, steps=8, guidance_scale=1.5)


@pytest.fixture(scope="module")
def compared(demo_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Comparison]:
    folder = tmp_path_factory.mktemp("compared")
    return {
        bits: vdit_quant.compare(
            demo_artifact(bits), "demo", WORKLOAD, seeds=(0, 1), device="cpu", picture=folder / f"{bits}.png"
        )
        for bits in ("w8a8", "w4a8")
    }


def test_eight_bits_are_close_and_closer_than_four(compared: dict[str, Comparison]) -> None:
    assert compared["w8a8"].psnr > 40
    assert compared["w8a8"].psnr > compared["w4a8"].psnr + 5
    assert 15 < compared["w4a8"].psnr < 40
    assert compared["w8a8"].ssim > compared["w4a8"].ssim > 0.5


def test_the_baseline_need_not_fit_on_the_device(
    compared: dict[str, Comparison], demo_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    fetch = BlockStream._fetch
    monkeypatch.setattr(BlockStream, "_fetch", lambda *args: (fetched.append(args[1]), fetch(*args)))
    workload = replace(WORKLOAD, offload=True)
    streamed = vdit_quant.compare(demo_artifact("w8a8"), "demo", workload, seeds=(0, 1), device="cpu")
    assert streamed.seeds == compared["w8a8"].seeds
    assert len(set(fetched)) == 8, "every block of the baseline"
    assert len(fetched) >= 8 * 2 * WORKLOAD.steps


def test_the_error_starts_at_zero_and_grows(compared: dict[str, Comparison]) -> None:
    for seed in compared["w4a8"].seeds:
        assert len(seed.step_error) == WORKLOAD.steps
        assert seed.step_error[0] == 0, "the two runs did not begin with the same noise"
        assert 0 < seed.step_error[1] < seed.step_error[-1]


def test_sizes_and_summary_are_stated(compared: dict[str, Comparison], demo: Path) -> None:
    result = compared["w4a8"]
    assert result.bytes_baseline == pytest.approx(
        (demo / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size, rel=0.01
    )
    assert result.bytes_artifact < 0.65 * result.bytes_baseline
    assert result.psnr == pytest.approx(sum(s.psnr for s in result.seeds) / 2)
    assert result.psnr_spread > 0
    assert result.sampler == "DDIMScheduler"


def test_bytes_are_those_of_the_files_of_an_artifact(tiny_artifact: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folded"
    shutil.copytree(tiny_artifact, folder)
    tensors = load_file(folder / WEIGHTS)
    name = "transformer_blocks.0.ff.net.2.bias"
    save_file({**tensors, name: tensors[name].float()}, folder / WEIGHTS)
    for path in (tiny_artifact, folder):
        source = find_source(path)
        want = sum(t.nbytes for t in load_file(path / WEIGHTS).values())
        assert stored_bytes(source, load_transformer(source, torch.float32)) == want
    source = find_source(tiny_folder)  # in float32
    values = sum(t.numel() for t in load_file(tiny_folder / WEIGHTS).values())
    assert stored_bytes(source, load_transformer(source, torch.float32)) == 2 * values


def test_the_result_is_json_and_the_picture_a_png(compared: dict[str, Comparison]) -> None:
    for result in compared.values():
        data = json.loads(json.dumps(result.to_dict()))
        assert data["psnr"] == pytest.approx(result.psnr)
        assert len(data["seeds"]) == 2
        assert result.picture is not None
        assert Path(result.picture).read_bytes().startswith(b"\x89PNG")


def test_the_guidance_of_a_bare_transformer_is_stated(tiny_artifact: Path, tiny_folder: Path) -> None:
    for given, used in ((None, 1.5), (3.0, 3.0)):
        workload = Workload(samples=2, steps=2, guidance_scale=given)
        result = vdit_quant.compare(tiny_artifact, tiny_folder, workload, (1,), "cpu")
        assert result.workload["guidance_scale"] == used


def test_a_bare_transformer_is_compared_on_latents(tiny_artifact: Path, tiny_folder: Path) -> None:
    result = vdit_quant.compare(tiny_artifact, tiny_folder, Workload(samples=3, steps=3), seeds=(0,), device="cpu")
    assert 10 < result.psnr < 90
    assert len(result.seeds[0].step_error) == 3


def test_the_samples_do_not_depend_on_the_batch_size(demo: Path, sqnr: Callable[..., float]) -> None:
    sampler = make_sampler(find_source(demo), torch.float32, "cpu")
    runs = [sampler.run(Workload(samples=3, steps=3, seed=4, batch_size=size), keep_trajectory=True) for size in (1, 3)]
    assert sqnr(runs[0].images, runs[1].images) > 60
    assert torch.equal(runs[0].trajectory[0], runs[1].trajectory[0])
    assert len(runs[0].trajectory) == 3
    other = sampler.run(Workload(samples=3, steps=3, seed=5))
    assert sqnr(other.images, runs[0].images) < 20


def test_another_architecture_is_refused(
    tiny_artifact: Path, demo: Path, demo_artifact: Callable[..., Path], tiny_folder: Path
) -> None:
    for artifact, baseline in (
        (tiny_artifact, demo / "transformer"),
        (demo_artifact("w4a8") / "transformer", tiny_folder),
    ):
        with pytest.raises(InputError, match=r"not the same architecture.*num_layers"):
            vdit_quant.compare(artifact, baseline, WORKLOAD)


def test_only_a_pruned_model_may_have_fewer_blocks(tmp_path: Path) -> None:
    config = {
        "_class_name": "FluxTransformer2DModel", "num_layers": 3, "num_single_layers": 4, "num_attention_heads": 2,
        "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "joint_attention_dim": 24, "pooled_projection_dim": 16,
    }  # fmt: skip
    changes = {"whole": {}, "fewer": {"num_layers": 1, "num_single_layers": 2}, "other": {"joint_attention_dim": 32}}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **change}))
    whole, fewer, other = (find_source(tmp_path / name) for name in changes)
    with pytest.raises(InputError, match=r"not the same architecture \(num_layers, num_single_layers\)"):
        check_same(fewer, whole)
    (tmp_path / "fewer" / "prune.json").write_text("{}")
    check_same(fewer, whole)
    with pytest.raises(InputError, match="joint_attention_dim, num_layers"):
        check_same(fewer, other)


@pytest.mark.parametrize("change", [{"num_attention_heads": 4}, {"sample_size": 16}])
def test_another_width_or_latent_is_another_architecture(
    change: dict[str, int], tiny_artifact: Path, tiny_folder: Path, copy_of: Callable[[Path], Path]
) -> None:
    other = copy_of(tiny_folder)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=f"not the same architecture .*{next(iter(change))}"):
        check_pair(tiny_artifact, other)


def test_a_baseline_is_full_precision_and_of_the_same_kind(
    tiny_artifact: Path, demo: Path, demo_artifact: Callable[..., Path]
) -> None:
    with pytest.raises(InputError, match="expected a full-precision model as the baseline"):
        check_pair(tiny_artifact, tiny_artifact)
    with pytest.raises(InputError, match=r"is a pipeline and .* a bare transformer"):
        check_pair(demo_artifact("w4a8"), demo / "transformer")


def test_models_that_draw_other_conditions_are_not_paired() -> None:
    part = Samples(torch.zeros(1, 3, 4, 4))
    ours, theirs = (SeedSamples((part,), digest_conditions({"class_labels": [label]}), None) for label in (1, 2))
    with pytest.raises(InputError, match="seed 1: the two models drew different conditions"):
        measure(1, ours, theirs)


def test_a_plain_checkpoint_is_no_artifact(demo: Path) -> None:
    with pytest.raises(InputError, match="not a vdit-quant artifact"):
        vdit_quant.compare(demo, demo, WORKLOAD)


FEW = ("--steps", "2", "--samples", "2", "--device", "cpu")


def _alter(folder: Path, value: float) -> None:
    """Gives a model other weights of the same shapes."""
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "proj_out_2.bias": torch.full_like(tensors["proj_out_2.bias"], value)}, folder / WEIGHTS)


@pytest.fixture
def own_pair(tiny_folder: Path, copy_of: Callable[[Path], Path], plain_recipe: Callable[[str], Any]) -> tuple[str, str]:
    """(artifact, its source) to change at will, as folders beside each other."""
    source = copy_of(tiny_folder)
    artifact = vdit_quant.compress(source, source.parent / "out", recipe=plain_recipe("w8-a8tok"))
    return str(artifact), str(source)


def test_the_default_baseline_must_still_be_the_source(own_pair: tuple[str, str], cli: Callable[..., Any]) -> None:
    artifact, source = own_pair
    done = cli("compare", artifact, *FEW, "-o", "before")
    assert done.code == 0, done.err
    _alter(Path(source), 3.0)
    done = cli("compare", artifact, *FEW, "-o", "after")
    assert done.code == 2
    assert f"{source}: not the checkpoint that {artifact} was made from" in done.err
    assert f"--baseline {source}" in done.err
    assert cli("compare", artifact, *FEW, "--baseline", source, "-o", "after").code == 0


def test_one_scheduler_samples_both(own_pair: tuple[str, str]) -> None:
    artifact, source = map(Path, own_pair)
    workload = Workload(samples=2, steps=2)
    diffusers.EulerDiscreteScheduler().save_pretrained(source / "scheduler")
    borrowed = vdit_quant.compare(artifact, source, workload, seeds=(1,), device="cpu")
    assert borrowed.seeds[0].step_error[0] == 0
    assert borrowed.psnr > 30, "the artifact, which has no scheduler, was sampled with another"
    diffusers.EulerDiscreteScheduler().save_pretrained(artifact / "scheduler")
    config = artifact / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("{", '{"of_another_version": 1,', 1))
    check_pair(artifact, source)
    diffusers.EulerDiscreteScheduler(timestep_spacing="trailing").save_pretrained(artifact / "scheduler")
    with pytest.raises(InputError, match=r"out/scheduler and .*tiny-dit/scheduler .*\(timestep_spacing\)"):
        check_pair(artifact, source)
    diffusers.DDIMScheduler().save_pretrained(artifact / "scheduler")
    with pytest.raises(InputError, match="DDIMScheduler and EulerDiscreteScheduler"):
        check_pair(artifact, source)


@pytest.mark.parametrize("output", ["afile", "afile/x"])
def test_an_output_that_is_no_folder_is_told_before_sampling(
    output: str, tiny_artifact: Path, tiny_folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("afile").write_text("mine")
    monkeypatch.setattr("vdit_quant.evaluate.compare.sample_seeds", lambda *_: pytest.fail("sampled before the check"))
    done = cli("compare", tiny_artifact, "--baseline", tiny_folder, *FEW, "-o", output)
    assert done.code == 2
    assert "afile: expected a folder or nothing there, found a file" in done.err
    assert Path("afile").read_text() == "mine"


def test_the_record_is_kept_when_the_picture_cannot_be_written(
    tiny_artifact: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vdit_quant.evaluate.compare.save_pairs", full)
    record, picture = tmp_path / "made" / "comparison.json", tmp_path / "made" / "samples.png"
    with pytest.raises(OutputError, match=r"samples\.png: could not be written .*No space left"):
        vdit_quant.compare(
            tiny_artifact, tiny_folder, Workload(samples=2, steps=2), (1,), "cpu", picture=picture, record=record
        )
    found = json.loads(record.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["psnr"] > 10
    assert found["ssim"] is None
    assert found["seeds"][0]["ssim"] is None


def test_the_numbers_are_shown_when_nothing_can_be_written(
    tiny_artifact: Path, tiny_folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _data: object) -> None:
        path.write_text("{", encoding="utf-8")
        raise OSError(28, "No space left on device")

    once = cli("compare", tiny_artifact, "--baseline", tiny_folder, *FEW, "-o", "out")
    before = Path("out/comparison.json").read_bytes()
    monkeypatch.setattr("vdit_quant.evaluate.compare.write_json", full)
    done = cli("compare", tiny_artifact, "--baseline", tiny_folder, *FEW, "-o", "out")
    assert done.code == 2
    assert "comparison.json: could not be written (" in done.err
    mean = next(line for line in once.out.splitlines() if line.startswith("mean"))
    assert mean in done.out
    assert Path("out/comparison.json").read_bytes() == before, "the earlier result is lost"
    assert sorted(path.name for path in Path("out").iterdir()) == ["comparison.json", "samples.png"]


def test_an_artifact_that_cannot_be_loaded_is_told_before_the_baseline_is_sampled(
    own_pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, source = map(Path, own_pair)
    file = next(artifact.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    monkeypatch.setattr("vdit_quant.evaluate.compare._run", lambda *_: pytest.fail("sampled before the check"))
    with pytest.raises(InputError, match=file.name):
        vdit_quant.compare(artifact, source, Workload(samples=2, steps=2), seeds=(1,), device="cpu")


def test_a_seed_that_numbers_no_samples(tiny_artifact: Path, tiny_folder: Path) -> None:
    for seed in (-1, 10**13):
        with pytest.raises(InputError, match=rf"--seed {seed}: expected a whole number from 0 to"):
            vdit_quant.compare(tiny_artifact, tiny_folder, WORKLOAD, seeds=(seed,))


def test_a_seed_is_given_once(tiny_artifact: Path, tiny_folder: Path) -> None:
    for seeds, words in (((1, 2, 1), "found 1, 2, 1"), ((), "found none")):
        with pytest.raises(InputError, match=f"--seed: .*each of them once, {words}"):
            vdit_quant.compare(tiny_artifact, tiny_folder, WORKLOAD, seeds=seeds)


def test_a_broken_model_is_named(own_pair: tuple[str, str]) -> None:
    artifact, source = map(Path, own_pair)
    workload = Workload(samples=2, steps=2)
    for broken, role in ((artifact, "artifact"), (source, "baseline")):  # the baseline comes first where both are
        _alter(broken, float("nan"))
        with pytest.raises(InputError, match=rf"{broken} \({role}\), seed 1: 2 of 2 samples hold NaN or infinity"):
            vdit_quant.compare(artifact, source, workload, seeds=(1,), device="cpu")
