"""Symmetric 6-bit integers, eight to six bytes, decoded *exactly* to int8 with one scale per row.

Per row:     `w = q * weight_scale[n]`, q in [-32, 31].
With groups: `w = v * weight_scale[n]`, `v = (q * weight_group_scale[n, g] + 32) >> 6`, an int8 in [-127, 127].

The largest step of a row is about 4 of its int8 levels. A group whose step is under a quarter of that has fewer than 64
distinct levels and is held as `int8` would hold it.
"""

from __future__ import annotations

from ..integer import PackedInteger


class Int6(PackedInteger):
    """weight uint8 [N, 6 ceil(K/8)]; weight_scale float32 [N]; with groups also weight_group_scale uint8
    [N, K / group_size]."""

    tag = "6"


FORMAT = Int6(6)
