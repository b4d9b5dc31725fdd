"""Low-rank branches: the best rank-r part of a weight (or of its quantisation error) as the layer's inputs see it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .damping import cholesky, with_damping
from .errors import InputError
from .format import Tensors
from .layer import LOW_RANK_DTYPE, check_shape, weight_layout
from .spec import LayerSpec

_OVERSAMPLE = 16
_POWER_ITERATIONS = 4
_DAMP = 1e-4


def weighted_low_rank(matrix: Tensor, gram: Tensor | None, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The rank-r `up @ down` that minimises `tr((M - up down) G (M - up down)^T)`.

    matrix   float32 [N, K]
    gram     float32 [K, K] (x^T x of the inputs), or None: the plain Frobenius norm
    returns  up float32 [N, r], down float32 [r, K]

    With G = L L^T it is the truncated SVD of `M L`, brought back by `L^-1`. The SVD is randomised (Halko et al. 2011,
    arXiv 0909.4061) with a fixed seed where that is cheaper. Raises InputError when the Gram matrix has no factor.
    """
    if gram is None:
        u, s, v = _svd(matrix, rank, seed)
        return u * s, v.T
    lower = with_damping(gram, _DAMP, cholesky)
    u, s, v = _svd(matrix @ lower.float(), rank, seed)
    down = torch.linalg.solve_triangular(lower, v.T.double(), upper=False, left=False)
    return u * s, down.float()


def join_adapter(
    tensors: Tensors, spec: LayerSpec, down: Tensor, up: Tensor, scale: float = 1.0
) -> tuple[Tensors, LayerSpec]:
    """The tensors and spec of a layer whose low-rank branch also holds a LoRA adapter (Hu et al. 2021, arXiv
    2106.09685), `y += scale x A^T B^T`: exact but for the branch's 16-bit factors, and nothing is quantised again.

    tensors, spec  of a compressed layer [N, K], with or without a branch
    down, up       A float [r, K] and B float [N, r]; `scale` is alpha / r
    Raises InputError when the adapter does not fit the layer, or the branch becomes wider than the layer.
    """
    rank, k = down.shape
    n = up.shape[0]
    layout = weight_layout(n, k, spec)
    if up.shape[1] != rank or any(tensors[name].shape != t.shape for name, t in layout.items()):
        raise InputError(f"adapter {list(down.shape)} and {list(up.shape)}: does not fit the layer ({spec.name})")
    joined = dataclasses.replace(spec, rank=spec.rank + rank)
    check_shape(n, k, joined, "of the adapter")
    if spec.pre_scale:  # the branch reads the input times this
        down = down.float() / tensors["pre_quant_scale"]
    new = {"proj_down": down.to(LOW_RANK_DTYPE), "proj_up": (up.float() * scale).to(LOW_RANK_DTYPE)}
    if spec.rank:
        new = {name: torch.cat((tensors[name], t), dim) for dim, (name, t) in enumerate(new.items())}
    return {**tensors, **new}, joined


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
