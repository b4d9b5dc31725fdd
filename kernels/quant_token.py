"""Dynamic symmetric int8 quantisation of activations, one scale per token."""

import torch
from torch import Tensor

from . import dispatch
from .op import define_op

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

TINY = 1e-30
"""Smallest row maximum: keeps 127 / amax finite in fp32, so that an all-zero row gives zero codes."""

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Code dtype -> the code of a row's largest magnitude. fp8 rounds to nearest even by its cast and saturates."""


def _check(x: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in FLOATS or x.shape[1] == 0:
        raise ValueError(
            f"quant_token: expected a float32, bfloat16 or float16 [M, K] tensor with K > 0, "
            f"found {x.dtype} of shape {tuple(x.shape)}"
        )


def round_rows(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of fp32 rows [M, K] for a code dtype of `LIMITS`: the unchecked body, shared with fused ops."""
    amax = wide.abs().amax(dim=1).clamp_min_(TINY)
    # As tensors: dividing by or into a Python number is a multiplication with a rounded reciprocal on some devices.
    limit = torch.full_like(amax, LIMITS[dtype])
    codes = wide * (limit / amax).unsqueeze(1)
    if dtype == torch.int8:
        codes = codes.round_()
    else:
        codes = codes.clamp_(-LIMITS[dtype], LIMITS[dtype])
    return codes.to(dtype), amax / limit


def _reference(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    return round_rows(x.float(), torch.int8)


@define_op("quant_token")
def quant_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """codes[m, k] = round_half_even(x[m, k] * (127 / amax[m])), scale[m] = amax[m] / 127, amax[m] = max_k |x[m, k]|.

    x: fp32 | bf16 | fp16 [M, K], row-major
    returns codes: int8 [M, K], within [-127, 127]
    returns scale: fp32 [M]; positive and finite for finite x, not finite for a row that holds inf or nan
    Raises ValueError for another dtype or rank.
    """
    return _reference(x)


@quant_token.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0],), dtype=torch.float32)


@quant_token.register_cuda
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return dispatch.run("quant_token", _reference, x)
