"""2-bit integers on the odd grid -3, -1, 1, 3, four to a byte, decoded *exactly* to int8 with one scale per row.

Per row:     `w = (2q + 1) * weight_scale[n]`, q in [-2, 1].
With groups: `w = v * weight_scale[n]`, `v = ((2q + 1) * weight_group_scale[n, g] + 4) >> 3`, an int8 in [-96, 96].

Why not -2, -1, 0, 1: on a Gaussian weight in groups of 64, each with its best constant clip, that grid gives 8.15 dB
and the odd one 9.20 dB (covering the whole range: 3.6 and 5.9 dB). What it lacks is a zero: an all-zero group has the
scale 0. `CLIP` is the part of a group's range that is covered, the ratio with the least squared error on such a weight.
"""

from __future__ import annotations

from ..integer import PackedInteger

CLIP = {16: 0.72, 32: 0.64, 64: 0.58, 128: 0.53, None: 0.43}


class Int2(PackedInteger):
    """weight uint8 [N, 2 ceil(K/8)]; weight_scale float32 [N]; with groups also weight_group_scale uint8
    [N, K / group_size]."""

    tag = "2"


FORMAT = Int2(2, odd=True, clip=CLIP)
