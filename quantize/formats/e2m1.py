"""FP4 with E2M1 elements, the one of the OCP microscaling formats: see `quantize/minifloat.py`."""

from __future__ import annotations

from ..minifloat import Minifloat


class E2m1(Minifloat):
    """See `Minifloat`."""

    tag = "e2m1"


FORMAT = E2m1("e2m1")
