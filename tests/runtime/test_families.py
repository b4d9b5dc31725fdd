"""Which layers of a model are compressed: the parts of its blocks, never its embedders, on real model classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from vdit_quant.calibrate.pipeline import compress
from vdit_quant.runtime.artifact import read_config
from vdit_quant.runtime.attach import linear_layers
from vdit_quant.runtime.family import find_family
from vdit_quant.runtime.linear import CompressedLinear

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def _pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, sample_size=8, caption_channels=24
    )


def _sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=8, in_channels=4, out_channels=4, num_layers=3, joint_attention_dim=24,
        caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip


def _flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=24, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _wan() -> Any:
    return diffusers.WanTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, text_dim=24, freq_dim=16, ffn_dim=48, num_layers=2, rope_max_seq_len=32
    )


def _cogvideox() -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, time_embed_dim=32, text_embed_dim=24, sample_width=8,
        sample_height=8, sample_frames=5, max_text_seq_length=3,
    )  # fmt: skip


def _text(tokens: int = 3) -> torch.Tensor:
    return torch.randn(2, tokens, 24)


TIME = torch.full((2,), 500)
# model, its blocks' prefixes, arguments of one call, layers of a block that must be compressed with their roles
MODELS: dict[str, tuple[Any, tuple[str, ...], Any, dict[str, str]]] = {
    "pixart": (
        _pixart,
        ("transformer_blocks.",),
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": _text(),
            "timestep": TIME,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        {"transformer_blocks.1.attn2.to_out.0": "attention", "transformer_blocks.1.ff.net.0.proj": "feed_forward"},
    ),
    "sd3": (
        _sd3,
        ("transformer_blocks.",),
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": _text(),
            "pooled_projections": torch.randn(2, 16),
            "timestep": TIME,
        },
        {
            "transformer_blocks.0.norm1_context.linear": "modulation",
            "transformer_blocks.0.attn.add_k_proj": "attention",
            "transformer_blocks.0.attn.to_add_out": "attention",
            "transformer_blocks.0.ff_context.net.2": "feed_forward",
        },
    ),
    "flux": (
        _flux,
        ("transformer_blocks.", "single_transformer_blocks."),
        lambda: {
            "hidden_states": torch.randn(2, 16, 4),
            "encoder_hidden_states": _text(),
            "pooled_projections": torch.randn(2, 16),
            "timestep": TIME / 1000,
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(3, 3),
        },
        {
            "single_transformer_blocks.0.proj_out": "feed_forward",
            "single_transformer_blocks.1.proj_mlp": "feed_forward",
            "single_transformer_blocks.1.norm.linear": "modulation",
            "single_transformer_blocks.1.attn.to_v": "attention",
        },
    ),
    "wan": (
        _wan,
        ("blocks.",),
        lambda: {
            "hidden_states": torch.randn(2, 4, 2, 8, 8),
            "encoder_hidden_states": _text(),
            "timestep": TIME,
        },
        {"blocks.0.attn2.to_k": "attention", "blocks.1.ffn.net.2": "feed_forward"},
    ),
    "cogvideox": (
        _cogvideox,
        ("transformer_blocks.",),
        lambda: {
            "hidden_states": torch.randn(2, 2, 4, 8, 8),
            "encoder_hidden_states": _text(),
            "timestep": TIME,
        },
        {"transformer_blocks.0.norm2.linear": "modulation", "transformer_blocks.1.attn1.to_out.0": "attention"},
    ),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Any, tuple[str, ...], Any, dict[str, str]]:
    build, prefixes, arguments, layers = MODELS[request.param]
    torch.manual_seed(1)
    return build().eval(), prefixes, arguments, layers


def test_every_layer_in_a_block_has_a_role_and_the_others_stay(case: Any) -> None:
    model, prefixes, _, layers = case
    roles = find_family(model).linears(model)
    assert list(roles) == list(linear_layers(model))
    inside = {name: role for name, role in roles.items() if name.startswith(prefixes)}
    assert set(inside.values()) <= {"attention", "feed_forward", "modulation"}, inside
    assert {name: roles[name] for name in layers} == layers
    outside = {role for name, role in roles.items() if name not in inside}
    assert outside <= {"embedder", "output", "other"}


@torch.no_grad()
def test_a_random_model_survives_compression_and_plain_from_pretrained(
    case: Any, tmp_path: Path, plain_recipe: Callable[[str], Any], sqnr: Callable[..., float]
) -> None:
    model, prefixes, arguments, layers = case
    inputs = arguments()
    want = model(**inputs).sample
    folder = compress(model, tmp_path / "out", recipe=plain_recipe("w8-a8tok"))
    loaded = type(model).from_pretrained(folder)
    compressed = {name for name, m in loaded.named_modules() if isinstance(m, CompressedLinear)}
    assert compressed == {name for name in linear_layers(model) if name.startswith(prefixes)}
    assert compressed >= set(layers)
    assert read_config(folder).resolve(linear_layers(model)).keys() == compressed
    assert sqnr(loaded(**inputs).sample, want) > 25


def test_four_bits_with_small_groups_fit_every_block_layer(
    case: Any, tmp_path: Path, plain_recipe: Callable[[str], Any]
) -> None:
    model, prefixes, _, _ = case
    folder = compress(model, tmp_path / "out", recipe=plain_recipe("w4g64-a8tok"), group_size=16)
    specs = read_config(folder).resolve(linear_layers(model))
    assert {spec.name for spec in specs.values()} <= {"w4g16-a8tok", "w8"}
    assert all(name.startswith(prefixes) for name in specs)


def test_the_last_layer_of_a_single_block_is_not_the_models_output() -> None:
    model = _flux()
    roles = find_family(model).linears(model)
    assert roles["single_transformer_blocks.0.proj_out"] == "feed_forward"
    assert roles["proj_out"] in ("output", "other")


def test_dit_knows_its_layers_and_guidance_branches(tiny_dit: Callable[..., Any]) -> None:
    model = tiny_dit()
    family = find_family(model)
    assert family.name == "dit"
    assert family.block_names(model) == ["transformer_blocks.0", "transformer_blocks.1"]
    roles = family.linears(model)
    counts = {role: sum(1 for r in roles.values() if r == role) for role in set(roles.values())}
    assert counts == {"attention": 8, "feed_forward": 4, "modulation": 2, "embedder": 4, "output": 2}
    assert roles["transformer_blocks.0.norm1.linear"] == "modulation"
    assert roles["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"] == "embedder"
    assert family.branches({"class_labels": torch.tensor([3, 1000, 0])}, 3, 0).tolist() == [0, 1, 0]
    conditions = family.conditions(model, 5, torch.Generator().manual_seed(0))
    again = family.conditions(model, 5, torch.Generator().manual_seed(0))
    assert torch.equal(conditions["class_labels"], again["class_labels"])
    assert int(conditions["class_labels"].max()) < 1000
    assert family.unconditional(model, conditions)["class_labels"].tolist() == [1000] * 5


def test_labels_that_were_never_trained_are_not_drawn(demo: Path) -> None:
    model = diffusers.DiTTransformer2DModel.from_pretrained(demo / "transformer")
    labels = find_family(model).conditions(model, 200, torch.Generator().manual_seed(0))["class_labels"]
    assert set(labels.tolist()) == set(range(10))


GENERIC = {  # class -> what makes it small, and its lists of blocks
    "AuraFlowTransformer2DModel": (
        {"num_mmdit_layers": 1, "num_single_dit_layers": 2},
        {"joint_transformer_blocks", "single_transformer_blocks"},
    ),
    "HunyuanVideoTransformer3DModel": (
        {"num_layers": 2, "num_single_layers": 2},
        {"transformer_blocks", "single_transformer_blocks", "context_embedder.token_refiner.refiner_blocks"},
    ),
    "LTXVideoTransformer3DModel": ({"num_layers": 2}, {"transformer_blocks"}),
    "Lumina2Transformer2DModel": ({"num_layers": 2}, {"layers", "noise_refiner", "context_refiner"}),
    "PRXTransformer2DModel": ({"depth": 2}, {"blocks"}),
    "QwenImageTransformer2DModel": ({"num_layers": 2}, {"transformer_blocks"}),
    "SanaTransformer2DModel": ({"num_layers": 2}, {"transformer_blocks"}),
    "ZImageTransformer2DModel": ({"n_layers": 2}, {"layers", "noise_refiner", "context_refiner"}),
}


@pytest.mark.parametrize("kind", GENERIC)
def test_models_without_a_family_are_planned_by_their_names(kind: str) -> None:
    config, lists = GENERIC[kind]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    family = find_family(model)
    assert family.name == "generic"
    blocks = family.block_names(model)
    found = {block.rpartition(".")[0] for block in blocks}
    assert found == lists
    for name, role in family.linears(model).items():
        if any(name.startswith(f"{block}.") for block in blocks):
            assert role in ("attention", "feed_forward", "modulation"), f"{name}: {role}"
