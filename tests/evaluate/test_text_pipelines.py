"""Pipelines with text encoders, tiny and random, from calibration to comparison."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import vdit_quant
from vdit_quant.evaluate.offload import BlockStream, open_sampler
from vdit_quant.evaluate.sampling import Workload, make_sampler
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.linear import CompressedLinear
from vdit_quant.runtime.source import find_source

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
CLIP = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "projection_dim": 16, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def _tokenizer(length: int) -> Any:
    """Every word is unknown to it but it pads, ends and cuts as those of the encoders do."""
    words = ["<pad>", "</s>", "<unk>", "a", "of", "the", "in", "with"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("</s>", 1)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=ends)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **special)


def _t5() -> tuple[Any, Any]:
    return transformers.T5EncoderModel(transformers.T5Config(**T5)).eval(), _tokenizer(64)


def _clip(kind: str) -> tuple[Any, Any]:
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**CLIP)).eval(), _tokenizer(77)


def _vae() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, shift_factor=0.0, **blocks).eval()


def _flux() -> Any:
    model = diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, _vae(), *_clip("CLIPTextModel"), *_t5(), model)


def _sd3() -> Any:
    model = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=16, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
    )  # fmt: skip
    clips = [*_clip("CLIPTextModelWithProjection"), *_clip("CLIPTextModelWithProjection")]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(model, scheduler, _vae(), *clips, *_t5())


def _wan(denoisers: int = 1) -> Any:
    config = {**HEADS, "in_channels": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 16, "ffn_dim": 48}
    made = [diffusers.WanTransformer3DModel(**config, num_layers=2, rope_max_seq_len=32) for _ in range(denoisers)]
    two = {"transformer_2": made[1], "boundary_ratio": 0.9} if denoisers > 1 else {}
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.WanPipeline(_tokenizer(64), encoder, vae, scheduler, made[0], **two)


def _cogvideox() -> Any:
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, time_embed_dim=16, text_embed_dim=32, sample_width=2,
        sample_height=2, sample_frames=9, max_text_seq_length=16, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    vae = diffusers.AutoencoderKLCogVideoX(
        **blocks, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    encoder, tokenizer = _t5()
    return diffusers.CogVideoXPipeline(tokenizer, encoder, vae.eval(), model, diffusers.CogVideoXDDIMScheduler())


PIPELINES: dict[str, tuple[Callable[[], Any], str]] = {
    "flux": (_flux, "32x32"),
    "sd3": (_sd3, "32x32"),
    "wan": (_wan, "5x32x32"),
    "wan22": (lambda: _wan(2), "5x32x32"),
    "cogvideox": (_cogvideox, "9x16x16"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The pipeline of a name on disk, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("pipelines") / name
            PIPELINES[name][0]().save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", PIPELINES)
def test_calibrated_compared_and_loaded(
    name: str, folder: Callable[[str], Path], cli: Callable[..., Any], plain_recipe: Callable[[str], Any]
) -> None:
    size = PIPELINES[name][1]
    recipe = Path("recipe.toml")
    recipe.write_text('[[step]]\nmethod = "gptq"\nspec = "w8-a8tok"\nroles = ["attention", "feed_forward"]\n')
    few = ("--steps", "2", "--samples", "3", "--batch-size", "2", "--device", "cpu")
    done = cli("calibrate", folder(name), "-o", "out", "--recipe", recipe, "--size", size, *few)
    assert done.code == 0, done.err
    recorded = json.loads(Path("out/transformer/config.json").read_text())["quantization_config"]["provenance"]
    assert recorded["workload"]["size"] == size
    done = cli("compare", "out", "--samples", "2", "--steps", "2", "--device", "cpu")  # at that size, unasked
    assert done.code == 0, done.err
    result = json.loads(Path("out-compare/comparison.json").read_text())
    assert result["workload"]["size"] == size
    assert result["psnr"] > 25
    assert Path("out-compare/samples.png").read_bytes().startswith(b"\x89PNG")
    pipe = vdit_quant.load("out", device="cpu")
    assert type(pipe).__name__ == json.loads((folder(name) / "model_index.json").read_text())["_class_name"]


def test_both_denoisers_of_a_pipeline_are_compressed_one_after_the_other(
    folder: Callable[[str], Path], cli: Callable[..., Any]
) -> None:
    recipe = Path("recipe.toml")
    recipe.write_text('[[step]]\nmethod = "gptq"\nspec = "w8-a8tok"\nroles = ["attention", "feed_forward"]\n')
    few = ("--recipe", recipe, "--steps", "4", "--samples", "2", "--size", "5x32x32", "--device", "cpu")
    first = cli("calibrate", folder("wan22"), "-o", "one", *few)
    assert first.code == 0, first.err
    assert "transformer_2, another denoiser of this pipeline, stays as it is" in " ".join(first.out.split())
    refused = cli("calibrate", "one", "-o", "two", *few)
    assert refused.code == 2
    assert "--component transformer_2 compresses its other denoiser" in refused.err
    second = cli("calibrate", "one", "--component", "transformer_2", "-o", "two", *few)
    assert second.code == 0, second.err
    assert "stays as it is" not in second.out
    pipe = vdit_quant.load("two", device="cpu")
    for model in (pipe.transformer, pipe.transformer_2):
        assert isinstance(model.blocks[0].attn1.to_q, CompressedLinear)
    assert pipe("a", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="np").frames.shape[0] == 1
    shown = cli("inspect", "two", "--component", "transformer_2")
    assert "transformer_2 of transformer and transformer_2" in shown.out


def test_the_second_denoiser_may_be_compressed_alone(folder: Callable[[str], Path], cli: Callable[..., Any]) -> None:
    few = ("--bits", "w8a8", "--method", "rtn", "--component", "transformer_2", "-o", "out", "--device", "cpu")
    done = cli("calibrate", folder("wan22"), *few)
    assert done.code == 0, done.err
    done = cli("compare", "out", "--samples", "1", "--steps", "4", "--size", "5x32x32", "--device", "cpu")
    assert done.code == 0, done.err
    assert json.loads(Path("out-compare/comparison.json").read_text())["psnr"] > 25
    assert "transformer_2 of" in cli("inspect", "out").out


def test_what_cannot_be_asked_of_two_denoisers(folder: Callable[[str], Path], cli: Callable[..., Any]) -> None:
    wrong = cli("calibrate", folder("wan22"), "--component", "transformer_3", "-o", "out")
    assert wrong.code == 2
    assert "did you mean 'transformer" in wrong.err
    bare = cli("calibrate", folder("wan22") / "transformer_2", "--component", "transformer", "-o", "out")
    assert bare.code == 2
    assert "a bare transformer" in bare.err
    steps = cli("calibrate", folder("wan22"), "--bits", "w8a8", "--full-steps", "1,0", "-o", "out")
    assert steps.code == 2
    assert "has two" in steps.err


def test_both_denoisers_are_offloaded(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, enter = list[Any](), BlockStream.__enter__
    monkeypatch.setattr(BlockStream, "__enter__", lambda self: (streamed.append(self.model), enter(self))[1])
    source = find_source(folder("wan22"), "transformer_2")
    with open_sampler(source, torch.float32, torch.device("cpu"), offload=True) as (sampler, stream):
        pipe: Any = sampler.pipe  # type: ignore[attr-defined]
        assert stream is not None
        assert stream.model is sampler.denoiser is pipe.transformer_2
        assert {id(model) for model in streamed} == {id(pipe.transformer), id(pipe.transformer_2)}


def test_two_denoisers_are_not_pruned(folder: Callable[[str], Path], cli: Callable[..., Any]) -> None:
    for more in ((), ("--dry-run",)):
        done = cli("prune", folder("wan22"), "--keep", "1", "-o", "out", *more)
        assert done.code == 2
        assert "two denoisers, each for a part of the noise levels" in done.err


def test_prompts_of_ones_own_are_what_is_sampled(folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("of\nthe\n")
    sampler = make_sampler(find_source(folder("flux")), torch.float32, "cpu")
    workload = Workload(2, 1, size=(32, 32), prompts=str(tmp_path / "mine.txt"))
    assert sampler.conditions(workload) == {"prompt": ["of", "the"]}
    mine, shipped = (sampler.run(w).images for w in (workload, Workload(2, 1, size=(32, 32))))
    assert not torch.equal(mine, shipped)


def test_statistics_are_taken_without_decoding(
    folder: Callable[[str], Path], tmp_path: Path, plain_recipe: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", lambda *_: pytest.fail("pictures were decoded"))
    step = {"method": "gptq", "spec": "w8-a8tok", "roles": ["attention"]}
    recipe = type(plain_recipe("w8-a8tok")).from_dict({"step": [step]}, "mine")
    settings = {"steps": 1, "samples": 1, "size": "32x32", "device": "cpu"}
    assert vdit_quant.compress(folder("flux"), tmp_path / "out", recipe=recipe, **settings).exists()


def test_a_size_that_a_pipeline_refuses_is_one_clear_error(folder: Callable[[str], Path]) -> None:
    sampler = make_sampler(find_source(folder("wan")), torch.float32, "cpu")
    with pytest.raises(InputError, match=r"--size 5x33x32: WanPipeline does not take it: .*divisible"):
        sampler.run(Workload(1, 1, size=(5, 33, 32)))
    with pytest.raises(InputError, match="FluxPipeline makes no videos"):
        make_sampler(find_source(folder("flux")), torch.float32, "cpu").run(Workload(1, 1, size=(5, 32, 32)))
