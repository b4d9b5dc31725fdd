"""FP4 with the element chosen row by row among E2M1, E1M2 and E3M0 (after HQ-DiT, Liu & Zhang 2024, arXiv
2405.19751): see `quantize/minifloat.py`."""

from __future__ import annotations

from ..minifloat import ELEMENTS, Minifloat


class Fp4(Minifloat):
    """See `Minifloat`."""

    tag = "fp4"


FORMAT = Fp4(*ELEMENTS)
