"""Sampling with any scheduler: noise along the way, dynamic shifting, another variance of the first noise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import vdit_quant
from vdit_quant.evaluate.sampling import DenoiserSampler, PipelineSampler, Workload, load_scheduler, make_sampler
from vdit_quant.evaluate.timesteps import count_tokens, latent_tokens, set_timesteps
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.artifact import read_config
from vdit_quant.runtime.schedule import StepPlan
from vdit_quant.runtime.source import find_source

WORKLOAD = Workload(samples=3, steps=3, seed=4, batch_size=3)
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_noise_along_the_way_is_the_samples_own(scheduler: str, tiny_dit: Callable[..., Any]) -> None:
    sampler = DenoiserSampler(tiny_dit(), getattr(diffusers, scheduler)())
    first = sampler.run(WORKLOAD).images
    torch.rand(7)
    assert torch.equal(sampler.run(WORKLOAD).images, first)
    alone = sampler.run(replace(WORKLOAD, batch_size=1)).images
    torch.testing.assert_close(alone, first, atol=1e-4, rtol=1e-4)
    assert not torch.equal(sampler.run(replace(WORKLOAD, seed=5)).images, first)


def test_the_guidance_of_a_pipeline_is_known_where_it_is_its_default(demo: Path) -> None:
    sampler = make_sampler(find_source(demo), torch.float32, "cpu")
    conditions = sampler.conditions(WORKLOAD)
    assert sampler.guidance(WORKLOAD, conditions) == 4.0  # DiTPipeline's
    assert sampler.guidance(replace(WORKLOAD, guidance_scale=2.0), conditions) == 2.0


def test_a_pipeline_with_noise_along_the_way_repeats_itself(demo: Path) -> None:
    sampler = make_sampler(find_source(demo), torch.float32, "cpu")
    assert isinstance(sampler, PipelineSampler)
    sampler.pipe.scheduler = sampler.scheduler = diffusers.DDPMScheduler(beta_schedule="linear")
    state = torch.get_rng_state()
    first = sampler.run(WORKLOAD).images
    assert torch.equal(torch.get_rng_state(), state), "the caller's own draws depend on what was sampled"
    torch.rand(7)
    assert torch.equal(sampler.run(WORKLOAD).images, first)
    assert not torch.equal(sampler.run(replace(WORKLOAD, seed=5)).images, first)


def test_the_first_noise_has_the_schedulers_variance(tiny_dit: Callable[..., Any]) -> None:
    sampler = DenoiserSampler(tiny_dit(), diffusers.EulerDiscreteScheduler())
    start = sampler.run(WORKLOAD, keep_trajectory=True).trajectory[0]
    # what the model sees is scaled back to about one
    assert 0.9 < float(start.std()) < 1.1


@pytest.mark.parametrize(("tokens", "mu"), [(16, 0.459375), (256, 0.5), (1024, 0.63), (4096, 1.15)])
def test_dynamic_shifting_is_that_of_the_pipeline(tokens: int, mu: float) -> None:
    ours, theirs = (diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC) for _ in range(2))
    set_timesteps(ours, 5, tokens)
    theirs.set_timesteps(5, mu=mu)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)


def test_noise_levels_are_for_schedulers_that_take_them() -> None:
    plain, given = diffusers.EulerDiscreteScheduler(), diffusers.EulerDiscreteScheduler()
    set_timesteps(plain, 4)
    set_timesteps(given, 4, None, [1, 0.75, 0.5, 0.25])
    assert torch.equal(plain.timesteps, given.timesteps)
    one = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC, base_image_seq_len=64, max_image_seq_len=64)
    set_timesteps(one, 4, 64)


def test_a_latent_without_a_known_size_counts_as_the_longest() -> None:
    ours, theirs = (diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC) for _ in range(2))
    set_timesteps(ours, 5)
    set_timesteps(theirs, 5, 4096)
    assert torch.equal(ours.timesteps, theirs.timesteps)


def test_tokens_of_a_latent(tiny_dit: Callable[..., Any]) -> None:
    dit = tiny_dit()
    video = diffusers.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=16, num_layers=1, rope_max_seq_len=16,
    )  # fmt: skip
    assert latent_tokens(dit) == 16
    assert count_tokens((4, 3, 8, 6), video) == 3 * 4 * 3
    assert count_tokens((96, 64), dit) == 96
    assert latent_tokens(video) is None


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A random FLUX.1 with its dynamically shifting scheduler next to it, and conditions for 4 x 4 tokens."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "flux" / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC).save_pretrained(tmp_path / "flux" / "scheduler")
    tensors = {
        "encoder_hidden_states": torch.randn(2, 3, 24),
        "pooled_projections": torch.randn(2, 16),
        "img_ids": torch.zeros(2, 16, 3),
        "txt_ids": torch.zeros(2, 3, 3),
        "latents_shape": torch.tensor([16, 8]),
    }
    save_file(tensors, tmp_path / "flux" / "conditions.safetensors")
    return tmp_path / "flux"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"txt_ids": None}, "no tensor 'txt_ids', which FluxTransformer2DModel must be called with"),
        ({"img_ids": torch.arange(96.0).view(2, 16, 3)}, "img_ids: the model takes one for a whole batch"),
        ({"txt_ids": torch.zeros(2, 3, 2)}, r"txt_ids: expected \[count, any, 3\], found \[2, 3, 2\]"),
    ],
)
def test_positions_of_flux_are_one_table_for_all(change: dict[str, Any], words: str, flux: Path) -> None:
    path = flux / "conditions.safetensors"
    sampler = make_sampler(find_source(flux / "transformer"), torch.float32, "cpu")
    workload = Workload(samples=2, steps=1, conditions=str(path))
    seen: list[Any] = []
    sampler.denoiser.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["img_ids"]), with_kwargs=True)
    sampler.run(workload)
    assert [ids.shape for ids in seen] == [(16, 3)]
    save_file({k: t for k, t in {**load_file(path), **change}.items() if t is not None}, path)
    with pytest.raises(InputError, match=words):
        sampler.run(workload)


def test_a_bare_flux_goes_from_checkpoint_to_comparison(flux: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples": 2, "steps": 3, "conditions": str(flux / "conditions.safetensors")}
    artifact = vdit_quant.compress(flux / "transformer", tmp_path / "out", bits="w8a8", full_steps=(1, 1), **settings)
    picture = tmp_path / "samples.png"
    result = vdit_quant.compare(
        artifact, flux / "transformer", Workload(**settings), seeds=(1,), device="cpu", picture=picture
    )
    assert result.psnr > 25
    assert picture.exists()
    sampler = make_sampler(find_source(artifact), torch.float32, "cpu")
    sampler.run(Workload(**settings))
    pipelines = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    pipelines.set_timesteps(sigmas=[1, 2 / 3, 1 / 3], mu=0.459375)
    torch.testing.assert_close(sampler.scheduler.timesteps, pipelines.timesteps)
    plan = StepPlan.from_dict(read_config(artifact).plans["steps"])
    assert [plan.is_full(0.001 * float(t)) for t in pipelines.timesteps] == [True, False, True]


def test_more_steps_than_the_scheduler_has_are_one_clear_error(demo: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for model in (demo, tiny_folder):
        sampler = make_sampler(find_source(model), torch.float32, "cpu")
        with pytest.raises(InputError, match=r"--steps 2000: DDIMScheduler .*1000"):
            sampler.run(replace(WORKLOAD, steps=2000))
    with pytest.raises(InputError, match="--steps 2000: DDIMScheduler"):
        vdit_quant.compress(tiny_folder, tmp_path / "out", method="rtn", full_steps=(1, 1), steps=2000)


def test_a_flow_without_a_scheduler_is_refused(tmp_path: Path, cli: Callable[..., Any]) -> None:
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 24}
    model = diffusers.WanTransformer3DModel(**size, freq_dim=16, ffn_dim=64, num_layers=2, rope_max_seq_len=32)
    model.save_pretrained(tmp_path / "wan")
    texts = {"encoder_hidden_states": torch.randn(4, 3, 24), "latents_shape": torch.tensor([4, 1, 8, 8])}
    save_file(texts, tmp_path / "c.safetensors")
    few = ("--steps", "2", "--samples", "2", "--device", "cpu", "--conditions", tmp_path / "c.safetensors", "-o", "out")
    few = ("--bits", "w8a8", *few)
    for more in (("--dry-run",), ()):
        found = cli("calibrate", tmp_path / "wan", *few, *more)
        assert found.code == 2
        assert "wan: no scheduler/ in it or next to it" in found.err
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    found = cli("calibrate", tmp_path / "wan", *few)
    assert found.code == 0, found.err
    diffusers.CogVideoXDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(InputError, match="CogVideoXDPMScheduler steps in a way of its own"):
        load_scheduler(find_source(tmp_path / "wan"))


def test_a_model_of_other_classes_has_another_null_class(tmp_path: Path, cli: Callable[..., Any]) -> None:
    size = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    model = diffusers.DiTTransformer2DModel(**size, sample_size=8, num_embeds_ada_norm=10)
    model.save_pretrained(tmp_path / "ten")
    few = ("--steps", "2", "--samples", "8", "--device", "cpu")
    found = cli("calibrate", tmp_path / "ten", *few, "-o", "out")
    assert found.code == 0, found.err
    assert cli("compare", "out", *few, "-o", "seen").code == 0
    sampler = DenoiserSampler(model, diffusers.DDIMScheduler())
    conditions = sampler.conditions(Workload(samples=50))
    assert conditions.unguided is not None
    assert conditions.unguided["class_labels"].unique().tolist() == [10]
    assert int(conditions.guided["class_labels"].max()) < 10
