"""Block Hadamard rotation of activations: cheap, orthogonal, its own inverse."""

from functools import cache

import torch
from torch import Tensor

from . import dispatch
from .int8_linear import check_float, unfit
from .op import define_op

SEEDS = {"sylvester": ((1, 1), (1, -1)), "regular": ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))}
"""The symmetric matrices whose Kronecker powers are H."""


def _is_size(block_size: int, kind: str) -> bool:
    size = 1
    while size < block_size:
        size *= len(SEEDS[kind])
    return size == block_size


@cache
def check_kind(block_size: int, kind: str) -> None:
    """Raise ValueError unless a Hadamard matrix of this kind and size exists here."""
    if kind not in SEEDS:
        raise unfit("hadamard", f"kind to be one of {', '.join(SEEDS)}", repr(kind))
    power = "two" if kind == "sylvester" else "four"
    if not _is_size(block_size, kind):
        raise unfit("hadamard", f"block_size to be a power of {power} for {kind}", block_size)


@cache
def _matrix(block_size: int, kind: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Outside inference mode and on an explicit device: the cached matrix must serve every later caller.
    with torch.inference_mode(False):
        if device.type != "cpu":
            return _matrix(block_size, kind, torch.device("cpu"), dtype).to(device)
        seed = torch.tensor(SEEDS[kind], dtype=torch.float32, device="cpu")
        h = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        while h.shape[0] < block_size:
            h = torch.kron(seed, h)
        return h.to(dtype)


def matrix_on(block_size: int, kind: str, like: Tensor) -> Tensor:
    """`hadamard_matrix` on the device and in the dtype of `like`, cached: read it, do not write it."""
    return _matrix(block_size, kind, like.device, like.dtype)


def hadamard_matrix(block_size: int, kind: str) -> Tensor:
    """H with H @ H.T = block_size * I and H = H.T: Kronecker powers of one small symmetric matrix.

    sylvester: powers of [[1, 1], [1, -1]]; block_size is a power of two; the first column is constant.
    regular: powers of J - 2I (4 x 4); block_size is a power of four; every row sums to sqrt(block_size),
    so no column is constant and a large mean does not pile up in one channel.

    returns: fp32 [block_size, block_size] of +-1 on the CPU, cached: read it, do not write it
    Raises ValueError for an unknown kind or a size that kind does not have.
    """
    check_kind(block_size, kind)
    return _matrix(block_size, kind, torch.device("cpu"), torch.float32)


def _check(x: Tensor, signs: Tensor | None, block_size: int, kind: str) -> None:
    check_float("hadamard", x)
    check_kind(block_size, kind)
    k = x.shape[1]
    if k <= 0 or k % block_size != 0:
        raise unfit("hadamard", f"K to be a multiple of block_size {block_size}", f"K={k}")
    if signs is not None:
        ok = signs.dtype == torch.int8 and signs.shape == (k,)
        if not ok:
            raise unfit("hadamard", f"signs torch.int8 of shape ({k},)", signs)


def rotate(wide: Tensor, signs: Tensor | None, block_size: int, kind: str) -> Tensor:
    """`hadamard` of fp32 rows [M, K]: the unchecked body, shared with fused ops."""
    if signs is not None:
        wide = wide * signs
    h = _matrix(block_size, kind, wide.device, torch.float32)
    return torch.mm(wide.reshape(-1, block_size), h).mul_(block_size**-0.5).view(wide.shape)


def _reference(x: Tensor, signs: Tensor | None, block_size: int, kind: str) -> Tensor:
    _check(x, signs, block_size, kind)
    return rotate(x.float(), signs, block_size, kind).to(x.dtype)


@define_op("hadamard")
def hadamard(x: Tensor, signs: Tensor | None, block_size: int, kind: str) -> Tensor:
    """y[m, block] = ((x * signs)[m, block] @ H) / sqrt(b) for every run of b = block_size consecutive channels.

    x: fp32 | bf16 | fp16 [M, K], K a multiple of block_size
    signs: int8 [K] of +-1, or None
    kind: "sylvester" or "regular", see `hadamard_matrix`
    returns: x.dtype [M, K]
    Raises ValueError when a shape, dtype, size or kind does not fit.
    """
    return _reference(x, signs, block_size, kind)


@hadamard.register_fake
def _(x: Tensor, signs: Tensor | None, block_size: int, kind: str) -> Tensor:
    _check(x, signs, block_size, kind)
    return x.new_empty(x.shape)


@hadamard.register_cuda
def _(x: Tensor, signs: Tensor | None, block_size: int, kind: str) -> Tensor:
    _check(x, signs, block_size, kind)
    return dispatch.run("hadamard", _reference, x, signs, block_size, kind)
