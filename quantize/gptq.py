"""GPTQ: rounding with error feedback (Frantar et al. 2023, arXiv 2210.17323, algorithm 1), on any scalar grid.

Minimises `tr((Q - W) H (Q - W)^T)` over the grid, column by column: the error of a column is spread over those still to
be rounded through the Cholesky factor of H^-1. Cost: K steps on [N] vectors and K^2 N / 2 multiply-adds. The steps of
one block of columns are an op, `kernels/round_columns.py`; the columns after it get its errors as one product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.round_columns import round_columns
from .damping import cholesky, with_damping
from .format import ScalarFormat, Tensors, group_of
from .spec import FormatSpec

BLOCK = 128
DAMP = 0.01
SHORT_COLUMN = 8192


def gptq(
    weight: Tensor,
    gram: Tensor,
    scales: Tensors,
    spec: FormatSpec,
    damp: float = DAMP,
    act_order: bool = True,
) -> Tensor:
    """Codes int8 [N, K] of `weight` on the grid that `scales` span.

    weight     float32 [N, K]
    gram       float32 [K, K], sum or mean over rows of x x^T
    scales     the format's scale tensors, fixed beforehand (so any column order works with groups)
    damp       fraction of the mean diagonal added to the diagonal
    act_order  round the columns of the largest inputs first
    Raises InputError when the Gram matrix is not finite.
    """
    with _few_threads(weight):
        return _gptq(weight, gram, scales, spec, damp, act_order)


@contextmanager
def _few_threads(weight: Tensor) -> Iterator[None]:
    """One thread while working on short columns: handing thousands of tiny steps to a pool costs more than they do."""
    before = torch.get_num_threads()
    if weight.device.type == "cpu" and weight.shape[0] < SHORT_COLUMN:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gptq(weight: Tensor, gram: Tensor, scales: Tensors, spec: FormatSpec, damp: float, act_order: bool) -> Tensor:
    fmt = spec.resolve()
    assert isinstance(fmt, ScalarFormat)
    n, k = weight.shape
    order = torch.argsort(gram.diagonal(), descending=True) if act_order else torch.arange(k, device=weight.device)
    factor = inverse_factor(gram[order][:, order], damp)
    levels = fmt.levels(scales, spec).transpose(0, 1).contiguous()  # [groups, N, L]
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    group = group_of(k, spec, weight.device)[order]
    work = weight[:, order].clone()
    codes = torch.empty(n, k, dtype=torch.int64, device=weight.device)
    for start in range(0, k, BLOCK):
        own, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
        index, errors = round_columns(work[:, own], levels, middles, group[own], factor[own, own])
        codes[:, order[own]] = index
        work[:, later].addmm_(errors, factor[own, later], alpha=-1)
    return fmt.codes_of(codes)


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of (gram + damping)^-1, float32 [K, K]; the damping grows until it exists."""

    def factor(h: Tensor) -> Tensor | None:
        lower = cholesky(h)
        del h
        if lower is None:
            return None
        inverse = torch.cholesky_inverse(lower)
        del lower
        return cholesky(inverse, upper=True)

    return with_damping(gram, damp, factor).float()


def refine(codes: Tensor, weight: Tensor, gram: Tensor, scales: Tensors, spec: FormatSpec, sweeps: int = 2) -> Tensor:
    """Coordinate descent on the same objective from GPTQ's codes: each column is rounded again given all others. A Gram
    matrix of inputs that were all zero holds no objective, and the codes stay."""
    if not gram.diagonal().any():
        return codes
    with _few_threads(weight):
        return _refine(codes, weight, gram, scales, spec, sweeps)


def _refine(codes: Tensor, weight: Tensor, gram: Tensor, scales: Tensors, spec: FormatSpec, sweeps: int) -> Tensor:
    fmt = spec.resolve()
    assert isinstance(fmt, ScalarFormat)
    levels = fmt.levels(scales, spec).transpose(0, 1).contiguous()  # [groups, N, L]
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    k = weight.shape[1]
    group = group_of(k, spec, weight.device).tolist()
    h = gram / gram.diagonal().mean()
    diagonal = h.diagonal().clamp_min(1e-8)
    current = fmt.dequantize(codes, scales, spec)
    index = fmt.index_of(codes)
    gradient = (current - weight) @ h  # [N, K]
    for _ in range(sweeps):
        for j in range(k):
            target = current[:, j] - gradient[:, j] / diagonal[j]
            index[:, j : j + 1] = torch.searchsorted(middles[group[j]], target[:, None].contiguous())
            rounded = levels[group[j]].gather(1, index[:, j : j + 1])[:, 0]
            gradient.addr_(rounded - current[:, j], h[j])
            current[:, j] = rounded
    return fmt.codes_of(index)


def output_gain(weight: Tensor, rounded: Tensor, gram: Tensor | None) -> Tensor:
    """float32 [N]: w G w / w G q for every row w of `weight` and q of `rounded`; 1 where they do not point the same
    way. Rounding to the least error shrinks a row's output, at every step of a sampler alike."""
    seen = weight if gram is None else weight @ gram
    whole, along = (seen * weight).sum(1), (seen * rounded).sum(1)
    return torch.where(along > 0.1 * whole, whole / along, 1.0)
