"""Large-DiT (Alpha-VLLM 2024) and the form of it that TerDiT trains (Lu et al. 2024, arXiv 2405.14854), by class.

A DiT of LLaMA's parts: RMSNorm before each branch, rotary positions along the flattened tokens, SwiGLU. Parameters have
the names of the published checkpoints. In place of `DiTTransformer2DModel` it runs in diffusers' `DiTPipeline`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

FREQUENCIES = 256  # of the timestep embedding
THETA = 10000.0


class LargeDiT(ModelMixin, ConfigMixin):
    """Denoiser of latents [B, in_channels, H, W] by timestep [B] and class label [B]; label `num_classes` is none.

    num_kv_heads     heads of keys and values; None: as many as of queries
    ff_inner_dim     width between the layers of the feed-forward
    qk_norm          LayerNorm of all heads of q, and of k, together
    modulation_norm  RMSNorm behind each block's modulation layer, which TerDiT adds: ternary weights need it
    The timestep and label embeddings are as wide as a token, but no wider than 1024.
    """

    _no_split_modules = ("LargeDiTBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 16,
        num_attention_heads: int = 32,
        attention_head_dim: int = 48,
        num_kv_heads: int | None = None,
        ff_inner_dim: int = 4096,
        num_classes: int = 1000,
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        modulation_norm: bool = True,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        condition, pixels = min(width, 1024), patch_size * patch_size
        self.x_embedder = nn.Linear(pixels * in_channels, width)
        mlp = nn.Sequential(nn.Linear(FREQUENCIES, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, condition)})
        heads = num_attention_heads, num_kv_heads or num_attention_heads, attention_head_dim
        rest = ff_inner_dim, norm_eps, qk_norm, modulation_norm
        self.layers = nn.ModuleList(LargeDiTBlock(width, condition, heads, *rest) for _ in range(num_layers))
        self.final_layer = Final(width, condition, pixels * out_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Noise, and variance where `out_channels` has it: [B, out_channels, H, W]."""
        config: Any = self.config
        size = config.patch_size
        high, wide = hidden_states.shape[-2] // size, hidden_states.shape[-1] // size
        x = F.pixel_unshuffle(hidden_states, size).flatten(2).transpose(1, 2)  # channels, then rows and columns
        x = self.x_embedder(x)
        time = get_timestep_embedding(timestep, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        condition = self.t_embedder["mlp"](time.to(x.dtype)) + self.y_embedder["embedding_table"](class_labels)
        turns = rotations(x.shape[1], config.attention_head_dim, x.device)
        for block in self.layers:
            x = block(x, turns, condition)
        x = self.final_layer(x, condition)
        # rows and columns of the patch first, then channels
        x = x.unflatten(2, (size * size, -1)).transpose(2, 3).flatten(2).transpose(1, 2)
        out = F.pixel_shuffle(x.unflatten(2, (high, wide)), size)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


class LargeDiTBlock(nn.Module):
    def __init__(
        self,
        width: int,
        condition: int,
        heads: tuple[int, int, int],
        inner: int,
        eps: float,
        qk_norm: bool,
        modulation_norm: bool,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, *heads, qk_norm)
        self.feed_forward = FeedForward(width, inner)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        norm = [nn.RMSNorm(6 * width, eps)] if modulation_norm else []
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 6 * width), *norm)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], condition: Tensor) -> Tensor:
        """x [B, T, width], condition [B, C] -> [B, T, width]."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift, turns)
        return x + ff_gate * self.feed_forward(self.ffn_norm(x) * (1 + ff_scale) + ff_shift)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(width, heads * head_dim, bias=False)
        self.wk = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, width, bias=False)
        self.q_norm = nn.LayerNorm(heads * head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(kv_heads * head_dim) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, turns), rotate(k, turns), v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1])
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Final(nn.Module):
    def __init__(self, width: int, condition: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def rotations(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [tokens, 1, head_dim / 2] of token t's angles, t THETA**(-2 i / head_dim)."""
    rates = torch.exp(torch.arange(0, head_dim, 2, device=device) * (-math.log(THETA) / head_dim))
    angles = torch.outer(torch.arange(tokens, device=device), rates)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Heads [B, T, H, D] whose channels 2i and 2i + 1 are turned by the token's i-th angle."""
    cos, sin = turns
    a, b = x.unflatten(-1, (-1, 2)).to(torch.promote_types(x.dtype, torch.float32)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def find_config(shapes: Mapping[str, tuple[int, ...]], heads: int, sample_size: int) -> dict[str, Any] | None:
    """`config.json` of the `LargeDiT` whose parameters these are, by name and shape; None: they are not one's.

    heads        attention heads, of which shapes do not tell the number; published models have 32
    sample_size  latent pixels a side it was trained for
    """
    try:
        (width, pixels), (out, _) = shapes["x_embedder.weight"], shapes["final_layer.linear.weight"]
        first = "layers.0.attention.wk.weight", "layers.0.feed_forward.w1.weight", "y_embedder.embedding_table.weight"
        keys, inner, labels = (shapes[name][0] for name in first)
    except (KeyError, ValueError, IndexError):
        return None
    patch = 2  # that of every published model
    head_dim = width // heads
    if width % heads or head_dim % 2 or keys % head_dim:
        return None
    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    config = {
        "sample_size": sample_size, "patch_size": patch, "in_channels": pixels // patch**2,
        "out_channels": out // patch**2, "num_layers": len(layers), "num_attention_heads": heads,
        "attention_head_dim": head_dim, "num_kv_heads": None if keys == width else keys // head_dim,
        "ff_inner_dim": inner, "num_classes": labels - 1, "qk_norm": "layers.0.attention.q_norm.weight" in shapes,
        "modulation_norm": "layers.0.adaLN_modulation.2.weight" in shapes,
    }  # fmt: skip
    with torch.device("meta"):
        model = LargeDiT(**config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return json.loads(model.to_json_string()) if expected == dict(shapes) else None


MODEL = LargeDiT
