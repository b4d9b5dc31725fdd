"""Small models of every class that has fused blocks, compressed, and how they are called."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vdit_quant.quantize.compose import Choices, compress_linear
from vdit_quant.quantize.method import FloatLayer
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.attach import attach, linear_layers
from vdit_quant.runtime.family import find_family
from vdit_quant.runtime.models.large_dit import LargeDiT

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
COMPRESSED = ("attention", "feed_forward")
torch.manual_seed(0)
IDS = {"img_ids": torch.randint(4, (16, 3)), "txt_ids": torch.zeros(5, 3)}
ANGLES = (9 * torch.rand(32, 16)).repeat_interleave(2, 1)
ROTARY = (ANGLES.cos(), ANGLES.sin())


@dataclass(frozen=True)
class Case:
    """A small model of one class, the shapes of its inputs, and what else a call needs."""

    kind: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    extra: dict[str, Any]


CASES = {
    "dit": Case(
        "DiTTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 1000},
        {"hidden_states": (4, 8, 8)},
        {"class_labels": torch.tensor([3, 1000])},
    ),
    "pixart": Case(
        "PixArtTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 6, "cross_attention_dim": 64, "sample_size": 8,
         "caption_channels": 24},
        {"hidden_states": (4, 8, 8), "encoder_hidden_states": (6, 24)},
        {"encoder_attention_mask": torch.tensor([[1.0] * 6, [1.0, 1.0, 0, 0, 0, 0]])},
    ),
    "flux": Case(
        "FluxTransformer2DModel",
        {**HEADS, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24,
         "pooled_projection_dim": 16, "axes_dims_rope": (8, 12, 12)},
        {"hidden_states": (16, 8), "encoder_hidden_states": (5, 24), "pooled_projections": (16,)},
        IDS,
    ),
    "sd3": Case(
        "SD3Transformer2DModel",
        {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 24,
         "caption_projection_dim": 64, "pooled_projection_dim": 16, "pos_embed_max_size": 8, "qk_norm": "rms_norm"},
        {"hidden_states": (4, 8, 8), "encoder_hidden_states": (5, 24), "pooled_projections": (16,)},
        {},
    ),
    "wan": Case(
        "WanTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 128, "num_layers": 6,
         "rope_max_seq_len": 32},
        {"hidden_states": (4, 2, 8, 8), "encoder_hidden_states": (5, 24)},
        {},
    ),
    "cogvideox": Case(
        "CogVideoXTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "time_embed_dim": 32, "text_embed_dim": 24,
         "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 5,
         "use_rotary_positional_embeddings": True},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (5, 24)},
        {"image_rotary_emb": ROTARY},
    ),
    "large_dit": Case(
        "LargeDiT",
        {**HEADS, "num_layers": 3, "sample_size": 8, "ff_inner_dim": 128, "qk_norm": True},
        {"hidden_states": (4, 8, 8)},
        {"class_labels": torch.tensor([3, 1000])},
    ),
}  # fmt: skip


def build(case: Case) -> nn.Module:
    torch.manual_seed(1)
    model = getattr(diffusers, case.kind, LargeDiT)(**case.config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".norm_" in name:  # one everywhere when untrained, and then a norm that is left out shows nowhere
            parameter.uniform_(0.5, 1.5)
        if name.endswith("adaLN_modulation.2.weight"):  # gates of one, and a flipped code changes every code behind it
            parameter.uniform_(0.1, 0.3)
    return model


def call(
    model: nn.Module,
    case: Case,
    seed: int = 2,
    timestep: Tensor | None = None,
    dtypes: dict[str, torch.dtype] | None = None,
) -> Tensor:
    torch.manual_seed(seed)  # in training mode labels are dropped at random
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(2, *shape, generator=generator).to((dtypes or {}).get(name))
        for name, shape in case.shapes.items()
    }
    timestep = torch.tensor([300, 300]) if timestep is None else timestep
    if case.kind.startswith("Flux"):  # scaled in its own dtype
        timestep = timestep.to(made["hidden_states"].dtype)
    device = next(model.parameters()).device
    made = pytree.tree_map(lambda t: t.to(device), {**made, "timestep": timestep, **case.extra})
    out: Tensor = model(**made, return_dict=False)[0]
    return out.cpu()


def compress(model: nn.Module, spec: str = "w4g16-a8tok-h16", specs: dict[str, str] | None = None) -> nn.Module:
    """`spec` everywhere in the blocks, w8 for modulation; `specs` names layers (by ending) that get another one."""
    chosen, tensors = {}, {}
    layers = linear_layers(model)
    for name, role in find_family(model).linears(model).items():
        if role not in (*COMPRESSED, "modulation"):
            continue
        other = next((s for ending, s in (specs or {}).items() if name.endswith(ending)), None)
        chosen[name] = LayerSpec.parse(other or ("w8" if role == "modulation" else spec))
        weight, scaled = layers[name].weight.float(), chosen[name].pre_scale
        plain = replace(chosen[name], pre_scale=False)
        tensors[name] = compress_linear(FloatLayer(name, weight), None, plain, Choices(rounding="rtn", rounds=1))
        if scaled:  # as good as a calibrated one
            tensors[name]["pre_quant_scale"] = torch.linspace(0.5, 2, weight.shape[1])
    attach(model, chosen, tensors)
    return model


def compressed(case: Case, spec: str = "w4g16-a8tok-h16", specs: dict[str, str] | None = None) -> nn.Module:
    """A copy of its own of `compress(build(case), spec, specs)`, which is made once."""
    key = f"{case.kind} {case.config}", spec, str(specs)
    if key not in _MADE:
        _MADE[key] = compress(build(case), spec, specs)
    return copy.deepcopy(_MADE[key])


_MADE: dict[tuple[str, str, str], nn.Module] = {}


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal to fp32 rounding: quantisation turns a last-bit difference into a flipped code here and there."""
    return bool((found - expected).norm() < 2e-3 * expected.norm())
