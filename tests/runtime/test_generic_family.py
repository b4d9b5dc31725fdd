"""What the generic family takes for blocks where a list holds a single module."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

import vdit_quant
from vdit_quant.quantize.recipe import Recipe
from vdit_quant.runtime.family import find_family
from vdit_quant.runtime.linear import CompressedLinear

W8A8 = Recipe.from_dict({"step": [{"method": "rtn", "spec": "w8-a8tok", "roles": ["attention", "feed_forward"]}]}, "w8")


def named(kind: str, **parts: nn.Module) -> nn.Module:
    """A module of a class of that name."""
    made: nn.Module = type(kind, (nn.Module,), {})()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def copies(module: nn.Module, count: int) -> nn.ModuleList:
    return nn.ModuleList(copy.deepcopy(module) for _ in range(count))


def linear() -> nn.Linear:
    return nn.Linear(32, 32)


def transformer(depth: int) -> nn.Module:
    """A model by itself, with layers in front of its blocks and behind them."""
    blocks = copies(named("Layer", to_q=linear(), ff=linear()), depth)
    return named("Encoder", proj_in=linear(), layers=blocks, proj_out=linear())


def beside_two_blocks(module: nn.Module) -> nn.Module:
    """A model that holds `module` alone in a list, beside a list of blocks."""
    return named("Model", alone=nn.ModuleList([module]), blocks=copies(named("Block", attn=linear()), 2))


def roles_alone(module: nn.Module) -> dict[str, str]:
    """Its roles in such a model."""
    model = beside_two_blocks(module)
    roles = find_family(model).linears(model)
    assert roles["blocks.0.attn"] == "attention"
    return {name.removeprefix("alone.0."): role for name, role in roles.items() if name.startswith("alone.")}


BLOCKS = {
    "two roles": named("Layer", to_q=linear(), to_out=linear(), mlp=nn.Sequential(linear(), nn.GELU(), linear())),
    "feed-forward with modulation": named(
        "Residual", mlp=linear(), adaLN_modulation=nn.Sequential(nn.SiLU(), linear())
    ),
    "parts of a dictionary": nn.ModuleDict({"attn": linear(), "mlp": linear()}),
    "attention alone, called a block": named("ParallelBlock", attn=named("Fused", to_qkv_mlp_proj=linear())),
    "with experts": named("Layer", attn=linear(), experts=copies(named("Mlp", w1=linear()), 3)),
}

OTHERS = {
    "timestep embedder": TimestepEmbedding(32, 32),
    "embedder with an MLP": named("TimestepEmbedder", mlp=nn.Sequential(linear(), nn.SiLU(), linear())),
    "embedder called a block": named("TimeEmbeddingBlock", mlp=nn.Sequential(linear(), nn.SiLU(), linear())),
    "text projection": PixArtAlphaTextProjection(32, 32),
    "modulated norm": AdaLayerNormContinuous(32, 32),
    "head": named("FinalLayer", linear=linear(), adaLN_modulation=nn.Sequential(nn.SiLU(), linear())),
    "attention": Attention(32, heads=2, dim_head=16),
    "linear layer": linear(),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_alone_in_its_list_has_the_roles_of_one_among_several(kind: str) -> None:
    block = BLOCKS[kind]
    several = named("Model", blocks=copies(block, 2))
    roles = find_family(several).linears(several)
    expected = {name.removeprefix("blocks.0."): role for name, role in roles.items() if name.startswith("blocks.0.")}
    assert set(expected.values()) & {"attention", "feed_forward"}
    assert roles_alone(block) == expected


@pytest.mark.parametrize("kind", OTHERS)
def test_another_module_alone_in_a_list_keeps_its_precision(kind: str) -> None:
    model = beside_two_blocks(OTHERS[kind])
    assert find_family(model).block_names(model) == ["blocks.0", "blocks.1"]
    assert set(roles_alone(OTHERS[kind]).values()) == {"other"}


@pytest.mark.parametrize("depth", [1, 2])
def test_of_a_model_alone_in_a_list_its_own_blocks_are_taken(depth: int) -> None:
    roles = roles_alone(transformer(depth))
    assert roles["proj_in"] == roles["proj_out"] == "other"
    assert {roles[f"layers.{i}.to_q"] for i in range(depth)} == {"attention"}


@pytest.mark.parametrize(
    ("kind", "depths"),
    [
        ("Flux2Transformer2DModel", ("num_layers", "num_single_layers")),
        ("HunyuanVideoTransformer3DModel", ("num_layers", "num_single_layers", "num_refiner_layers")),
        ("Lumina2Transformer2DModel", ("num_layers", "num_refiner_layers")),
        ("SanaTransformer2DModel", ("num_layers",)),
        ("ZImageTransformer2DModel", ("n_layers", "n_refiner_layers")),
    ],
)
def test_models_with_one_block_of_each_kind_are_planned_as_deeper_ones(kind: str, depths: tuple[str, ...]) -> None:
    one, two = (_roles(kind, dict.fromkeys(depths, count)) for count in (1, 2))
    assert one == {name: role for name, role in two.items() if name in one}
    assert "attention" in one.values()


def _roles(kind: str, config: dict[str, Any]) -> dict[str, str]:
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    return find_family(model).linears(model)


class Own(nn.Module):
    """A model of one's own with a single block, and an embedder in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedders = nn.ModuleList([named("Embedder", mlp=linear())])
        self.blocks = nn.ModuleList([named("Block", attn=linear(), ff=linear())])

    def forward(self, x: Tensor) -> Tensor:
        x, block = self.embedders[0].mlp(x), self.blocks[0]
        return x + block.ff(torch.relu(x + block.attn(x)))


def test_a_model_of_ones_own_with_a_single_block_is_compressed(tmp_path: Path, sqnr: Callable[..., float]) -> None:
    torch.manual_seed(0)
    model, x = Own().eval(), torch.randn(3, 32)
    folder = vdit_quant.compress(model, tmp_path / "out", recipe=W8A8)
    fresh = vdit_quant.load_into(Own().eval(), folder)
    found = [name for name, m in fresh.named_modules() if isinstance(m, CompressedLinear)]
    assert found == ["blocks.0.attn", "blocks.0.ff"]
    with torch.no_grad():
        assert sqnr(fresh(x), model(x)) > 25
