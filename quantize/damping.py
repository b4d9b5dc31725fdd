"""Factors of Gram matrices that rounding, or inputs of few directions, left indefinite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InputError

_STEPS = 6


def with_damping(gram: Tensor, damp: float, factor: Callable[[Tensor], Tensor | None]) -> Tensor:
    """`factor(H + d I)` of the Gram matrix H float [K, K], given in float64 as a copy, with the least damping for which
    it is not None: `damp` times the mean diagonal, and 10 to 100,000 times as much.

    Raises InputError for a matrix that is not finite, or that no damping helps.
    """
    mean = gram.diagonal().double().mean()
    if not torch.isfinite(mean):
        raise InputError("the Gram matrix holds NaN or infinity")
    base = (damp * mean).clamp_min(1e-12)
    for attempt in range(_STEPS):
        found = factor(_damped(gram, base * 10**attempt))  # held there alone: a wide layer's takes gigabytes
        if found is not None:
            return found
    raise InputError(f"the Gram matrix is not positive definite even with damping {float(base) * 10**attempt:.3g}")


def _damped(gram: Tensor, damping: Tensor) -> Tensor:
    h = gram.to(torch.float64, copy=True)
    h.diagonal().add_(damping)
    return h


def cholesky(matrix: Tensor, upper: bool = False) -> Tensor | None:
    """The Cholesky factor of float64 [K, K]; None where the matrix is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    return None if failed else factor
