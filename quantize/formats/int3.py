"""Symmetric 3-bit integers, eight to three bytes, decoded *exactly* to int8 with one scale per row.

Per row:     `w = q * weight_scale[n]`, q in [-4, 3].
With groups: `w = v * weight_scale[n]`, `v = (q * weight_group_scale[n, g] + 4) >> 3`, an int8 in [-127, 127].

`CLIP` is the part of a group's range that is covered, the ratio with the least squared error on a Gaussian weight:
14.1 dB in groups of 64, 12.7 dB for the whole range.
"""

from __future__ import annotations

from ..integer import PackedInteger

CLIP = {16: 0.90, 32: 0.84, 64: 0.76, 128: 0.70, None: 0.55}


class Int3(PackedInteger):
    """weight uint8 [N, 3 ceil(K/8)]; weight_scale float32 [N]; with groups also weight_group_scale uint8
    [N, K / group_size]."""

    tag = "3"


FORMAT = Int3(3, clip=CLIP)
