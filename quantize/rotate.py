"""Block Hadamard rotations of a layer's input, and their effect on its weight and statistics.

The layer computes `(x R) (W R)^T = x W^T` with the orthogonal `R = diag(signs) blockdiag(H, H, ...) / sqrt(block)`.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..kernels.hadamard import hadamard
from .errors import InputError
from .spec import HadamardSpec

SYLVESTER_BLOCKS = (128, 64, 32, 16, 8, 4)
REGULAR_BLOCKS = (64, 16, 4)


def default_block(k: int, kind: str = "sylvester", largest: int = 128) -> int:
    """The largest supported block, at most `largest`, that divides K. Raises InputError when there is none."""
    blocks = REGULAR_BLOCKS if kind == "regular" else SYLVESTER_BLOCKS
    for block in blocks:
        if block <= largest and k % block == 0:
            return block
    raise InputError(f"no {kind} Hadamard block of at most {largest} divides K = {k}")


def make_signs(k: int, seed: int = 0) -> Tensor:
    """int8 [K] of +1 and -1, drawn from the width and the seed; stored in the artifact, never drawn again.

    Layers that read the same tensor have the same width, so their rotated input is the same too: it is rotated and
    quantised once for all of them.
    """
    digest = hashlib.sha256(f"{k}/{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return (torch.randint(0, 2, (k,), generator=generator) * 2 - 1).to(torch.int8)


def rotate_rows(matrix: Tensor, signs: Tensor, spec: HadamardSpec) -> Tensor:
    """float [M, K] -> `matrix R`: what a weight, or rows of the input, become."""
    return hadamard(matrix, signs, spec.block_size, spec.kind)


def rotate_gram(gram: Tensor, signs: Tensor, spec: HadamardSpec) -> Tensor:
    """float [K, K] -> `R^T gram R`: the Gram matrix of the rotated input."""
    half = rotate_rows(gram, signs, spec)
    return rotate_rows(half.T.contiguous(), signs, spec)


def unrotate_rows(matrix: Tensor, signs: Tensor, spec: HadamardSpec) -> Tensor:
    """float [M, K] -> `matrix R^T`: back to the input's own channels."""
    plain = hadamard(matrix, torch.ones_like(signs), spec.block_size, spec.kind)
    return plain * signs.to(plain.dtype)
