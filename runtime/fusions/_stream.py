"""What the blocks of several families share: a modulated stream of tokens around a joint attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..fusion import FusedBlock
from ..parts import Place
from ..stage import Norm, Stage

ACTIVATIONS = {"GEGLU": "geglu", "SwiGLU": "swiglu"}
_HEAD_NORMS = {("RMSNorm", True, False), ("LayerNorm", True, True)}  # class, with a weight, with a bias


def activation_of(module: Any) -> str | None:
    """The name, in `act_quant`, of the activation that a feed-forward's first module applies after its projection."""
    name = type(module).__name__
    if name == "GELU":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return ACTIVATIONS.get(name)


def norm_weights(*norms: Any) -> list[Tensor]:
    """The weights of the norms of q and k, and their biases if they have any; none when there are no such norms."""
    known = [norm for norm in norms if norm is not None]
    affine = [norm.weight for norm in known] + [norm.bias for norm in known if getattr(norm, "bias", None) is not None]
    return [tensor.detach() for tensor in affine]


def heads_refusal(norms: list[Any]) -> str | None:
    """Why `head_norm_rope` cannot do these norms of q and k (None: no norm); None when it can."""
    known = [norm for norm in norms if norm is not None]
    if len(known) not in (0, len(norms)):
        return "norms on some of q and k only"
    kinds = {(type(n).__name__, n.weight is not None, getattr(n, "bias", None) is not None, n.eps) for n in known}
    if len(kinds) > 1 or any(kind[:3] not in _HEAD_NORMS for kind in kinds):
        return "norms of q and k that are not known"
    return None


class Stream:
    """The stages of one of the two streams of a double block, or of both where they have the same layers."""

    def __init__(self, norm1: Any, norm2: Any, qkv: list[Place], out: Place, ff: Any) -> None:
        self.norm1, self.norm2 = Norm.of(norm1.norm), Norm.of(norm2)
        self.qkv, self.out, self.up, self.down = (
            Stage(*qkv),
            Stage(out),
            Stage((ff.net[0], "proj")),
            Stage((ff.net, "2")),
        )
        self.act = activation_of(ff.net[0]) or "none"
        self.stages = (self.qkv, self.out, self.up, self.down)

    def project(self, h: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
        """[B * T, K] -> [B * T, 3 N]: q, k and v."""
        return self.qkv.product(self.qkv.norm(h, self.norm1, mods[0], mods[1]))

    def finish(self, h: Tensor, attended: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
        """The block after attention: [B * T, K] -> [B * T, K]."""
        total = self.out.sum(self.out.act(attended), h, mods[2])
        h, rows = self.up.norm_sum(total, self.norm2, mods[3], mods[4])
        return self.down.add(self.down.act(self.up.product(rows), self.act), h, mods[5])


class TwoStreams(FusedBlock):
    """A block with an image and a text stream, named as diffusers names them in FLUX and SD3."""

    def __init__(self, block: nn.Module, cpu: bool = False) -> None:
        super().__init__(block, cpu)
        own: Any = block
        a = own.attn
        qkv, added = ([(a, name.format(part)) for part in "qkv"] for name in ("to_{}", "add_{}_proj"))
        self.image = Stream(own.norm1, own.norm2, qkv, (a.to_out, "0"), own.ff)
        self.text = Stream(own.norm1_context, own.norm2_context, added, (a, "to_add_out"), own.ff_context)
        self.stages = self.image.stages + self.text.stages
