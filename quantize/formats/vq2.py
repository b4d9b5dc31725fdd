"""2-bit vector quantisation: four weights to a code of 8 bits (the setting of VQ4DiT, Deng et al. 2024, arXiv
2408.17131): see `quantize/vector.py`."""

from __future__ import annotations

from ..vector import VectorFormat


class Vq2(VectorFormat):
    """A codebook of 256 entries of 4 weights."""

    tag = "vq2"


FORMAT = Vq2(256, 4)
