"""Denoisers of published shapes with random weights, their inputs, and a compressed copy: for speed, not quality."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from vdit_quant.calibrate.plan import make_plan
from vdit_quant.quantize.compose import Choices, compress_linear
from vdit_quant.quantize.method import FloatLayer
from vdit_quant.quantize.recipe import CORE_ROLES, Recipe, load_shipped, shipped
from vdit_quant.runtime.attach import attach, linear_layers
from vdit_quant.runtime.family import find_family


@dataclass(frozen=True)
class Shape:
    """A model's class, its configuration, and its inputs for a batch: name -> shape of one sample."""

    kind: str
    config: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]
    extra: Callable[[int, str], dict[str, Any]]


def _labels(batch: int, device: str) -> dict[str, Any]:
    return {"class_labels": torch.arange(batch, device=device) % 1000}


def _sizes(batch: int, device: str) -> dict[str, Any]:
    mask = torch.ones(batch, 300, device=device)
    mask[:, 120:] = 0
    size = torch.full((batch, 2), 1024.0, device=device)
    conditions = {"resolution": size, "aspect_ratio": torch.ones(batch, 1, device=device)}
    return {"encoder_attention_mask": mask, "added_cond_kwargs": conditions}


def _positions(height: int, width: int, text: int) -> Callable[[int, str], dict[str, Any]]:
    def extra(batch: int, device: str) -> dict[str, Any]:
        image = torch.zeros(height, width, 3, device=device)
        image[..., 1] = torch.arange(height, device=device)[:, None]
        image[..., 2] = torch.arange(width, device=device)
        places = {"img_ids": image.reshape(-1, 3), "txt_ids": torch.zeros(text, 3, device=device)}
        return {**places, "guidance": torch.full((batch,), 3.5, device=device)}

    return extra


def dit_xl(size: int = 32) -> Shape:
    """DiT-XL/2 at `size` latent pixels a side: 32 is 256 px, 256 tokens."""
    config = {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
        "sample_size": size, "patch_size": 2, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    return Shape("DiTTransformer2DModel", config, {"hidden_states": (4, size, size)}, _labels)


def pixart_sigma(size: int = 128) -> Shape:
    """PixArt-Sigma-XL/2 at `size` latent pixels a side: 128 is 1024 px, 4096 tokens."""
    config = {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
        "cross_attention_dim": 1152, "sample_size": size, "patch_size": 2, "caption_channels": 4096,
        "use_additional_conditions": False,
    }  # fmt: skip
    inputs = {"hidden_states": (4, size, size), "encoder_hidden_states": (300, 4096)}
    return Shape("PixArtTransformer2DModel", config, inputs, _sizes)


def flux(double: int = 4, single: int = 8, side: int = 64) -> Shape:
    """FLUX.1's blocks, fewer of them, at `side` x `side` image tokens (64: 1024 px) and 512 text tokens."""
    config = {
        "num_layers": double, "num_single_layers": single, "num_attention_heads": 24, "attention_head_dim": 128,
        "in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    }  # fmt: skip
    inputs = {"hidden_states": (side * side, 64), "encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}
    return Shape("FluxTransformer2DModel", config, inputs, _positions(side, side, 512))


def cogvideox(blocks: int = 6) -> Shape:
    """CogVideoX-5B's blocks, fewer of them: 49 frames of 480 x 720 pixels are 17,550 tokens, beside 226 of text."""
    config = {
        "num_layers": blocks, "num_attention_heads": 48, "attention_head_dim": 64, "time_embed_dim": 512,
        "use_rotary_positional_embeddings": True,
    }  # fmt: skip

    def extra(batch: int, device: str) -> dict[str, Any]:
        angles = torch.arange(17550, device=device)[:, None] / 10000 ** (torch.arange(32, device=device) / 32)
        angles = angles.repeat_interleave(2, 1)
        return {"image_rotary_emb": (angles.cos(), angles.sin())}

    inputs = {"hidden_states": (13, 16, 60, 90), "encoder_hidden_states": (226, 4096)}
    return Shape("CogVideoXTransformer3DModel", config, inputs, extra)


def build(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> nn.Module:
    """The model with random weights. Repeated embedders are equal, as they are in a trained DiT."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = getattr(diffusers, shape.kind)(**shape.config)
    for block in getattr(model, "transformer_blocks", [])[1:]:
        if getattr(getattr(block, "norm1", None), "emb", None) is not None:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.to(dtype).eval()


def inputs(shape: Shape, batch: int, dtype: torch.dtype, device: str, seed: int = 1) -> dict[str, Any]:
    """Call arguments for one batch."""
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[str, Any] = {
        name: torch.randn(batch, *size, generator=generator, device=device, dtype=dtype)
        for name, size in shape.inputs.items()
    }
    timestep = torch.full((batch,), 0.5 if shape.kind.startswith("Flux") else 500.0, device=device)
    made["timestep"] = timestep.to(dtype) if shape.kind.startswith("Flux") else timestep.long()
    for name, value in shape.extra(batch, device).items():
        floating = isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("_ids")
        made[name] = value.to(dtype) if floating else value
    return {**made, "return_dict": False}


SPECS = {
    "fp4": "wfp4-ae2m1tok",
    "ternary-a8": "wt-a8tok",
    "svdquant-w4a8": "w4g64-a8tok-h64-r32",
    "svdquant-w4a4": "w4g64-a4g64-h64-r32",
    "svdquant-fp4": "wfp4-ae2m1g16-h64-r32",
}
"""Names for specs of the attention and feed-forward layers that no shipped recipe of that name stands for."""


def recipe_of(name: str) -> Recipe:
    """A shipped recipe, or one of `SPECS` with 8-bit modulation layers."""
    if name in shipped():
        return load_shipped(name)
    method = "svdquant" if name.startswith("svdquant") else "rtn"
    core = {"method": method, "spec": SPECS[name], "roles": list(CORE_ROLES)}
    modulation = {"method": "rtn", "spec": "w8", "roles": ["modulation"]}
    return Recipe.from_dict({"name": name, "step": [core, modulation]}, name)


def compressed(model: nn.Module, recipe: str) -> nn.Module:
    """A copy of `model` compressed by the specs of a recipe, rounded to nearest (speed does not depend on it)."""
    model = copy.deepcopy(model)
    plan, layers = make_plan(model, find_family(model), recipe_of(recipe)), linear_layers(model)
    tensors, choices = {}, Choices(rounding="rtn", rounds=1)
    for layer in plan.compressed:
        assert layer.spec is not None
        weight = layers[layer.name].weight.detach().float()
        tensors[layer.name] = compress_linear(FloatLayer(layer.name, weight), None, layer.spec, choices)
    attach(model, plan.specs(), tensors)
    return model
