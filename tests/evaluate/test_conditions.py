"""Conditions from a file: which sample gets which, one clear error for each way a file can be wrong, a video model."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vdit_quant
from vdit_quant.evaluate.conditions import condition_order, read_conditions
from vdit_quant.evaluate.sampling import DenoiserSampler, Workload, make_sampler
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.family import find_family
from vdit_quant.runtime.models.large_dit import LargeDiT
from vdit_quant.runtime.source import find_source
from vdit_quant.runtime.step import StepTracker

COUNT = 5
GOOD: dict[str, Tensor] = {
    "encoder_hidden_states": torch.arange(COUNT)[:, None, None] * torch.ones(COUNT, 3, 24),
    "uncond.encoder_hidden_states": torch.full((1, 3, 24), -1.0),
    "latents_shape": torch.tensor([4, 2, 8, 8]),
}
WORKLOAD = Workload(samples=3, steps=3, guidance_scale=2.0, batch_size=2)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random video model with its scheduler next to it, as in a pipeline folder; only its transformer is there."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("video")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    model.save_pretrained(folder / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder / "transformer"


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """Writes a conditions file: the good one with these tensors changed, or left out where None."""

    def write(changes: dict[str, Tensor | None] | None = None) -> str:
        tensors = {k: t for k, t in {**GOOD, **(changes or {})}.items() if t is not None}
        save_file(tensors, tmp_path / "conditions.safetensors")
        return str(tmp_path / "conditions.safetensors")

    return write


def _sampler(video: Path, dtype: torch.dtype = torch.float32) -> DenoiserSampler:
    sampler = make_sampler(find_source(video), dtype, "cpu")
    assert isinstance(sampler, DenoiserSampler)
    return sampler


def test_every_condition_is_used_before_one_is_used_again(video: Path, file: Callable[..., str]) -> None:
    model = _sampler(video).denoiser
    found = read_conditions(file(), model, find_family(model), 2 * COUNT, seed=3)
    chosen = found.guided["encoder_hidden_states"][:, 0, 0].long()
    assert torch.equal(chosen, condition_order(COUNT, 2 * COUNT, 3))
    assert sorted(chosen[:COUNT].tolist()) == list(range(COUNT))
    assert torch.equal(chosen[:COUNT], chosen[COUNT:])
    assert not torch.equal(chosen, condition_order(COUNT, 2 * COUNT, 4))
    assert found.unguided is not None
    assert torch.equal(found.unguided["encoder_hidden_states"], torch.full((2 * COUNT, 3, 24), -1.0))
    assert found.latent_shape == (4, 2, 8, 8)


def test_the_unguided_branch_may_differ_for_each_condition(video: Path, file: Callable[..., str]) -> None:
    model = _sampler(video).denoiser
    path = file({"uncond.encoder_hidden_states": -GOOD["encoder_hidden_states"]})
    found = read_conditions(path, model, find_family(model), 7, seed=0)
    assert found.unguided is not None
    assert torch.equal(found.unguided["encoder_hidden_states"], -found.guided["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_hidden_states": None, "uncond.encoder_hidden_states": None}, "no tensor 'encoder_hidden_states'"),
        ({"encoder_hidden_state": torch.zeros(5, 3, 24)}, "did you mean 'encoder_hidden_states'"),
        ({"timestep": torch.zeros(5)}, "unknown condition 'timestep'"),
        ({"encoder_hidden_states": torch.zeros(5, 72)}, r"expected \[count, any, 24\], found \[5, 72\]"),
        ({"encoder_hidden_states": torch.zeros(5, 3, 23)}, r"expected \[count, any, 24\], found \[5, 3, 23\]"),
        ({"encoder_hidden_states": torch.zeros(0, 3, 24)}, r"found \[0, 3, 24\]"),
        ({"encoder_hidden_states": torch.full((5, 3, 24), float("nan"))}, "NaN or infinity"),
        ({"encoder_hidden_states_image": torch.zeros(4, 5, 8)}, "holds 5 conditions, but .* holds 4"),
        (
            {"uncond.encoder_hidden_states": torch.zeros(3, 24)},
            r"expected \[1, 3, 24\] or \[5, 3, 24\], found \[3, 24\]",
        ),
        ({"uncond.encoder_hidden_states": torch.zeros(2, 3, 24)}, r"found \[2, 3, 24\]"),
        ({"uncond.other": torch.zeros(1, 3)}, "uncond.other without other"),
        ({"uncond.encoder_hidden_states": None}, "no uncond.* tensors; guidance 2.0 needs them"),
        ({"latents_shape": None}, "no latents_shape"),
        ({"latents_shape": torch.tensor([4, 0, 8, 8])}, "latents_shape: expected a list of sizes"),
        ({"latents_shape": torch.ones(4)}, "latents_shape: expected a list of sizes"),
    ],
)
def test_a_wrong_file_is_one_clear_error(
    changes: dict[str, Tensor | None], words: str, video: Path, file: Callable[..., str]
) -> None:
    path = file(changes)
    with pytest.raises(InputError, match=words) as caught:
        _sampler(video).conditions(replace(WORKLOAD, conditions=path))
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents_shape": torch.tensor([4, 8, 8])}, "WanTransformer3DModel cannot be called with these conditions"),
        ({"latents_shape": torch.tensor([5, 2, 8, 8])}, "WanTransformer3DModel cannot be called .* 5 channels"),
    ],
)
def test_what_only_the_model_tells_is_one_clear_error(
    changes: dict[str, Tensor | None], words: str, video: Path, file: Callable[..., str]
) -> None:
    path = file(changes)
    with pytest.raises(InputError, match=words) as caught:
        _sampler(video).run(replace(WORKLOAD, conditions=path))
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize(
    ("name", "labels", "found"),
    [
        ("class_labels", torch.tensor([1, 5000, 3]), "torch.int64 from 1 to 5000"),
        ("class_labels", torch.tensor([-1, 2, 3]), "torch.int64 from -1 to 3"),
        ("class_labels", torch.tensor([1.0, 2.0, 3.0]), "torch.float32 from 1.0 to 3.0"),
        ("uncond.class_labels", torch.tensor([1001]), "torch.int64 from 1001 to 1001"),
    ],
)
def test_a_label_is_one_of_the_models(
    name: str, labels: Tensor, found: str, tiny_dit: Callable[..., Any], tmp_path: Path
) -> None:
    sampler = DenoiserSampler(tiny_dit(), diffusers.DDIMScheduler())
    good = {"class_labels": torch.tensor([0, 2, 1000]), "uncond.class_labels": torch.tensor([1000])}
    workload = Workload(samples=3, steps=1, conditions=str(tmp_path / "labels.safetensors"))
    save_file(good, tmp_path / "labels.safetensors")
    assert sampler.run(workload).images.isfinite().all()
    save_file({**good, name: labels}, tmp_path / "labels.safetensors")
    with pytest.raises(
        InputError, match=rf"labels\.safetensors: {name}: expected int64 labels from 0 to 1000 .*{found}"
    ):
        sampler.run(workload)


def test_a_label_is_one_of_a_large_dits(tmp_path: Path) -> None:
    model = LargeDiT(8, num_layers=1, num_attention_heads=2, attention_head_dim=16, ff_inner_dim=32, num_classes=10)
    save_file({"class_labels": torch.tensor([1, 11])}, tmp_path / "labels.safetensors")
    workload = replace(WORKLOAD, guidance_scale=1.0, conditions=str(tmp_path / "labels.safetensors"))
    with pytest.raises(InputError, match=r"labels from 0 to 10 \(10: no class\), found torch.int64 from 1 to 11"):
        DenoiserSampler(model, diffusers.DDIMScheduler()).conditions(workload)


def test_a_file_that_is_none(video: Path, tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("a cat")
    with pytest.raises(InputError, match="expected conditions as safetensors"):
        _sampler(video).conditions(replace(WORKLOAD, conditions=str(text)))
    with pytest.raises(InputError, match=r"nowhere\.safetensors: conditions cannot be read"):
        _sampler(video).conditions(replace(WORKLOAD, conditions="nowhere.safetensors"))


def test_a_model_that_needs_a_file_says_so(video: Path) -> None:
    with pytest.raises(InputError, match="--conditions FILE"):
        _sampler(video).conditions(WORKLOAD)


def test_a_whole_pipeline_takes_none(demo: Path, file: Callable[..., str]) -> None:
    sampler = make_sampler(find_source(demo), torch.float32, "cpu")
    with pytest.raises(InputError, match="not for a whole pipeline"):
        sampler.conditions(replace(WORKLOAD, conditions=file()))


def test_the_scheduler_next_to_the_model_is_used(video: Path) -> None:
    scheduler: Any = _sampler(video).scheduler
    assert isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert scheduler.config.shift == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_depend_on_nothing_but_their_number(video: Path, file: Callable[..., str], dtype: torch.dtype) -> None:
    sampler, workload = _sampler(video, dtype), replace(WORKLOAD, conditions=file())
    with StepTracker(sampler.denoiser, sampler.family) as tracker:
        images = sampler.run(workload).images
        assert tracker.branches.tolist() == [1, 0], "the unguided half comes first"
    assert images.shape == (3, 4, 2, 8, 8)
    alone = sampler.run(replace(workload, batch_size=1)).images
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(images, alone, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_guidance_follows_its_definition(video: Path, file: Callable[..., str]) -> None:
    sampler, workload = _sampler(video), replace(WORKLOAD, samples=1, conditions=file())
    got = sampler.run(workload).images
    text = GOOD["encoder_hidden_states"][condition_order(COUNT, 1, 0)]
    x = torch.randn(4, 2, 8, 8, generator=workload.generators(0, 1)[0])[None]
    sigmas = sampler.scheduler.sigmas.tolist()
    for sigma, following in itertools.pairwise(sigmas):
        time = torch.tensor([1000 * sigma])
        free, cond = (
            sampler.denoiser(x, timestep=time, encoder_hidden_states=t, return_dict=False)[0]
            for t in (torch.full((1, 3, 24), -1.0), text)
        )
        x = x + (following - sigma) * (free + 2.0 * (cond - free))
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)


def test_without_an_unguided_branch_the_model_runs_unguided(video: Path, file: Callable[..., str]) -> None:
    path = file({"uncond.encoder_hidden_states": None})
    for scale in (None, 1.0):
        workload = replace(WORKLOAD, samples=1, guidance_scale=scale, conditions=path)
        assert _sampler(video).run(workload).images.isfinite().all()


def test_the_command_line_takes_a_video_model_from_checkpoint_to_comparison(
    video: Path, file: Callable[..., str], cli: Callable[..., Any], tmp_path: Path
) -> None:
    path, artifact, folder = file(), tmp_path / "out", tmp_path / "compared"
    run = ("--conditions", path, "--steps", "2", "--samples", "2", "--guidance", "2")
    done = cli("calibrate", video, "-o", artifact, "--bits", "w8a8", *run)
    assert done.code == 0, done.err
    config = json.loads((artifact / "config.json").read_text())
    recorded = config["quantization_config"]["provenance"]["workload"]["conditions"]
    assert path not in json.dumps(config)
    assert len(recorded) == 16
    scheduler: Any = _sampler(artifact).scheduler
    assert scheduler.config.shift == 3.0, "the artifact lost its scheduler"
    done = cli("compare", artifact, "-o", folder, *run)
    assert done.code == 0, done.err
    result = json.loads((folder / "comparison.json").read_text())
    assert result["sampler"] == "FlowMatchEulerDiscreteScheduler"
    assert result["psnr"] > 25
    done = cli("compare", artifact, "-o", folder)
    assert done.code != 0
    assert "--conditions" in done.err


def test_statistics_come_from_the_given_conditions(video: Path, file: Callable[..., str], tmp_path: Path) -> None:
    settings = {"bits": "w8a8", "steps": 2, "samples": 2, "recipe": _clipped(tmp_path)}
    folder = vdit_quant.compress(video, tmp_path / "out", conditions=file(), **settings)
    assert (folder / "config.json").exists()
    with pytest.raises(InputError, match="--conditions FILE"):
        vdit_quant.compress(video, tmp_path / "other", **settings)


def _clipped(folder: Path) -> Path:
    """A recipe whose method asks for statistics."""
    path = folder / "clipped.toml"
    path.write_text(
        '[[step]]\nkind = "quantize"\nmethod = "rtn"\nspec = "w8-a8tok"\nroles = ["attention", "feed_forward"]\n'
        '[step.params]\nclip = "output"\n'
    )
    return path
