"""`LargeDiTBlock` of this package: RMSNorm and modulation, rotary attention, SwiGLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention import attend
from ...kernels.head_norm_rope import head_norm_rope
from ..fusion import FusedBlock, Fusion
from ..parts import Place
from ..stage import Norm, Stage
from ._stream import norm_weights


class FusedLargeDiTBlock(FusedBlock):
    def __init__(self, block: nn.Module, cpu: bool = False) -> None:
        super().__init__(block, cpu)
        own: Any = block
        a, ff = own.attention, own.feed_forward
        self.norms = Norm.of(own.attention_norm), Norm.of(own.ffn_norm)
        self.qkv, self.out = Stage((a, "wq"), (a, "wk"), (a, "wv")), Stage((a, "wo"))
        self.up, self.down = Stage((ff, "w3"), (ff, "w1")), Stage((ff, "w2"))  # the gate comes last
        self.stages = (self.qkv, self.out, self.up, self.down)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], condition: Tensor) -> Tensor:  # the block's signature
        if not self.accepts(x):
            return self.own(x, turns, condition)
        b, t, width = x.shape
        h, a = x.reshape(b * t, width), self.block.attention
        assert self.modulation is not None
        (out,) = self.modulation.of(self.index, (condition,), lambda: F.silu(condition))
        for norm in self.block.adaLN_modulation[2:]:
            out = norm(out)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = out.chunk(6, dim=1)
        qkv = self.qkv.product(self.qkv.norm(h, self.norms[0], shift, scale)).view(b, t, -1)
        # where there are no such norms the modules pass their input on
        norms = [norm for norm in (a.q_norm, a.k_norm) if not isinstance(norm, nn.Identity)]
        rope = self.once("rope", turns[0], lambda: [table[:, 0].repeat_interleave(2, 1) for table in turns])
        eps = norms[0].eps if norms else 0.0
        heads = head_norm_rope(qkv, norm_weights(*norms), None, [], rope, width // a.head_dim, eps)
        total = self.out.sum(self.out.act(attend(*heads, None)), h, gate)
        h, rows = self.up.norm_sum(total, self.norms[1], ff_shift, ff_scale)
        return self.down.add(self.down.act(self.up.product(rows), "swiglu"), h, ff_gate).view(b, t, width)


class LargeDiTBlock(Fusion):
    classes = ("LargeDiTBlock",)

    def refusal(self, block: nn.Module) -> str | None:
        a: Any = block.attention
        return None if a.wk.out_features == a.wq.out_features else "fewer heads of keys and values than of queries"

    def build(self, block: nn.Module, cpu: bool) -> FusedBlock:
        return FusedLargeDiTBlock(block, cpu)

    def modulators(self, block: nn.Module) -> list[Place]:
        own: Any = block
        return [(own.adaLN_modulation, "1")]


FUSION = LargeDiTBlock()
