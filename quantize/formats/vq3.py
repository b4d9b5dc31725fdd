"""3-bit vector quantisation: two weights to a code of 6 bits (the setting of VQ4DiT, Deng et al. 2024, arXiv
2408.17131): see `quantize/vector.py`."""

from __future__ import annotations

from ..vector import VectorFormat


class Vq3(VectorFormat):
    """A codebook of 64 entries of 2 weights."""

    tag = "vq3"


FORMAT = Vq3(64, 2)
