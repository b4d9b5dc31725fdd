"""NVFP4: E2M1 elements in blocks of 16 with an E4M3 scale, and an fp32 scale for each row."""

from __future__ import annotations

from torch import Tensor

from ...kernels.block_scales import E4M3_LARGEST, e4m3_bits, e4m3_scale
from ..block_float import BlockFloat
from ..integer import TINY


class Nvfp4(BlockFloat):
    """weight_block_scale: E4M3 bits; weight_scale: as fitted the row's largest magnitude / (6 * 448)."""

    tag = "nvfp4"
    group_sizes = (16,)

    def fit_blocks(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        row = (reach.amax(1) / (6 * E4M3_LARGEST)).clamp_min(TINY)
        return e4m3_bits(reach / 6 / row[:, None]), row

    def block_scale(self, bits: Tensor) -> Tensor:
        return e4m3_scale(bits)


FORMAT = Nvfp4()
