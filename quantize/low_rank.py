"""Low-rank branches: the best rank-r part of a weight (or of its quantisation error) as the layer's inputs see it."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLE = 16
_POWER_ITERATIONS = 4
_DAMP = 1e-4


def weighted_low_rank(matrix: Tensor, gram: Tensor | None, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The rank-r `up @ down` that minimises `tr((M - up down) G (M - up down)^T)`.

    matrix   float32 [N, K]
    gram     float32 [K, K] (x^T x of the inputs), or None: the plain Frobenius norm
    returns  up float32 [N, r], down float32 [r, K]

    With G = L L^T it is the truncated SVD of `M L`, brought back by `L^-1`. The SVD is randomised (Halko et al. 2011,
    arXiv 0909.4061) with a fixed seed where that is cheaper.
    """
    if gram is None:
        u, s, v = _svd(matrix, rank, seed)
        return u * s, v.T
    h = gram.double()
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    lower = torch.linalg.cholesky(h + eye * (_DAMP * h.diagonal().mean()).clamp_min(1e-12))
    u, s, v = _svd(matrix @ lower.float(), rank, seed)
    down = torch.linalg.solve_triangular(lower, v.T.double(), upper=False, left=False)
    return u * s, down.float()


def _svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    width = rank + _OVERSAMPLE
    if 2 * width >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=width, niter=_POWER_ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank]
