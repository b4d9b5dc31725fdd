"""The steps of GPTQ within one block of columns: each is rounded, and its error spread over those after it.

Calibration takes these steps for every column of a model. Column by column in torch they are ten tiny kernels each, and
starting those is then all that a GPU does; as one op, a block is one kernel.
"""

import torch
from torch import Tensor

from . import dispatch
from .int8_linear import unfit
from .op import define_op

OP = "round_columns"


def _check(targets: Tensor, levels: Tensor, middles: Tensor, group: Tensor, factor: Tensor) -> None:
    if targets.dtype != torch.float32 or targets.dim() != 2:
        raise unfit(OP, "targets torch.float32 [N, C]", targets)
    n, c = targets.shape
    ok = levels.dtype == torch.float32 and levels.dim() == 3 and levels.shape[1] == n and levels.shape[2] > 0
    if not ok:
        raise unfit(OP, f"levels torch.float32 [G, {n}, L] with L > 0", levels)
    between = (levels.shape[0], n, levels.shape[2] - 1)
    if middles.dtype != torch.float32 or middles.shape != between:
        raise unfit(OP, f"middles torch.float32 {between}", middles)
    if group.dtype != torch.int64 or group.shape != (c,):
        raise unfit(OP, f"group torch.int64 of shape ({c},)", group)
    if factor.dtype != torch.float32 or factor.shape != (c, c):
        raise unfit(OP, f"factor torch.float32 ({c}, {c})", factor)


def _reference(
    targets: Tensor, levels: Tensor, middles: Tensor, group: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    _check(targets, levels, middles, group, factor)
    columns = targets.T.clone(memory_format=torch.contiguous_format)  # each column is contiguous
    index = torch.empty(columns.shape, dtype=torch.int64, device=columns.device)
    errors = torch.empty_like(columns)
    for j, g in enumerate(group.tolist()):
        found = torch.searchsorted(middles[g], columns[j, :, None])
        index[j] = found[:, 0]
        rounded = levels[g].gather(1, found)[:, 0]
        torch.div(columns[j] - rounded, factor[j, j], out=errors[j])
        # A product and a sum, each rounded: whether `addr_` rounds once or twice depends on where in memory it works.
        columns[j + 1 :].sub_(torch.outer(factor[j, j + 1 :], errors[j]))
    return index.T.contiguous(), errors.T.contiguous()


@define_op(OP)
def round_columns(
    targets: Tensor, levels: Tensor, middles: Tensor, group: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """For j = 0, 1, ... C - 1, with t = targets at first (Frantar et al. 2023, arXiv 2210.17323, algorithm 1):

    index[n, j]  = how many of middles[group[j], n] are below t[n, j]; all of them for nan
    errors[n, j] = (t[n, j] - levels[group[j], n, index[n, j]]) / factor[j, j]
    t[n, i]     -= errors[n, j] * factor[j, i]  for the columns i > j

    targets: fp32 [N, C], a block of the weight's columns, in the order in which they are rounded
    levels: fp32 [G, N, L], what an element can be in each group of columns, ascending; values may repeat
    middles: fp32 [G, N, L - 1], (levels[..., 1:] + levels[..., :-1]) / 2: the same for every block of a weight
    group: int64 [C], below G
    factor: fp32 [C, C], the block of the upper Cholesky factor of the inverse Gram matrix; the diagonal and above
    returns index: int64 [N, C]; errors: fp32 [N, C], for the columns after the block
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(targets, levels, middles, group, factor)


@round_columns.register_fake
def _(targets: Tensor, levels: Tensor, middles: Tensor, group: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    _check(targets, levels, middles, group, factor)
    return targets.new_empty(targets.shape, dtype=torch.int64), targets.new_empty(targets.shape)


@round_columns.register_cuda
def _(targets: Tensor, levels: Tensor, middles: Tensor, group: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    _check(targets, levels, middles, group, factor)
    found: tuple[Tensor, Tensor] = dispatch.run(OP, _reference, targets, levels, middles, group, factor)
    return found
