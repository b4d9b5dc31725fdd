"""MXFP4: E2M1 elements in blocks of 32 with a power-of-two scale (OCP Microscaling Formats 1.0, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.block_scales import e8m0_bits, e8m0_scale
from ..block_float import BlockFloat
from ..spec import FormatSpec


class Mxfp4(BlockFloat):
    """weight_block_scale: E8M0 bits; weight_scale: 1 as fitted, another where rows were rescaled after rounding."""

    tag = "mxfp4"
    group_sizes = (32,)

    def fit_blocks(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        return e8m0_bits(reach), torch.ones(len(reach), device=reach.device)

    def own_clip(self, weight: Tensor, spec: FormatSpec) -> Tensor | float:
        """1, or 2 for the blocks that lose less with twice the standard's scale."""
        errors = []
        for ratio in (1.0, 2.0):
            scales = self.fit(weight, spec, ratio)
            error = (self.round_with(weight, scales) - weight).reshape(*scales["weight_block_scale"].shape, -1)
            errors.append(error.double().square().sum(-1))
        return torch.where(errors[1] < errors[0], 2.0, 1.0)

    def block_scale(self, bits: Tensor) -> Tensor:
        return e8m0_scale(bits)


FORMAT = Mxfp4()
