"""What a quantised layer wants of its input, and every fused op ends in: channel scale, block Hadamard, token codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .hadamard import check_kind, rotate
from .int4_linear import GROUPS
from .int8_linear import describe, unfit
from .quant_token import round_rows
from .quant_token_fp4 import round_rows_fp4

FORMS: dict[str, tuple[torch.dtype, int | None]] = {
    "int8": (torch.int8, None),
    "fp8": (torch.float8_e4m3fn, None),
    "fp4": (torch.int8, 0),
    **{f"fp4g{group}": (torch.int8, group) for group in GROUPS},
}
"""Name of an output form -> `code_dtype` and `fp4_group` of a `Transform` that ends in it."""

KINDS: tuple[list[torch.dtype], ...] = ([], [torch.float32], [torch.int8], [torch.float32, torch.int8])
"""dtypes of an op's list of pre_scale and signs."""


@dataclass(frozen=True)
class Transform:
    """z = blocks(y * pre_scale * signs) @ H / sqrt(block_size), then one symmetric scale per token; all in fp32.

    pre_scale: fp32 [K] or None
    signs: int8 [K] of +-1, or None; only with a Hadamard matrix
    block_size: 0 is no Hadamard matrix; hadamard_kind then says nothing
    code_dtype: torch.int8 or torch.float8_e4m3fn
    fp4_group: None, or the group of `quant_token_fp4`, whose codes (int8) and scales are then those of z
    """

    pre_scale: Tensor | None
    signs: Tensor | None
    block_size: int
    hadamard_kind: str
    code_dtype: torch.dtype
    fp4_group: int | None = None

    def check(self, op: str, k: int) -> None:
        """Raise ValueError unless this fits rows of `k` elements."""
        if k <= 0:
            raise unfit(op, "K > 0", f"K={k}")
        if self.pre_scale is not None:
            ok = self.pre_scale.dtype == torch.float32 and self.pre_scale.shape == (k,)
            if not ok:
                raise unfit(op, f"pre_scale torch.float32 of shape ({k},)", self.pre_scale)
        if self.signs is not None:
            ok = self.signs.dtype == torch.int8 and self.signs.shape == (k,)
            if not ok:
                raise unfit(op, f"signs torch.int8 of shape ({k},)", self.signs)
            if self.block_size <= 0:
                raise unfit(op, "a block_size with signs", self.block_size)
        if self.block_size:
            check_kind(self.block_size, self.hadamard_kind)
            if k % self.block_size != 0:
                raise unfit(op, f"K to be a multiple of block_size {self.block_size}", f"K={k}")
        if self.fp4_group and k % self.fp4_group != 0:
            raise unfit(op, f"K to be a multiple of the group {self.fp4_group}", f"K={k}")

    def quantize(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 rows [M, K] -> codes [M, K], scale fp32 [M]: the torch reference."""
        if self.pre_scale is not None:
            y = y * self.pre_scale
        if self.block_size:
            y = rotate(y, self.signs, self.block_size, self.hadamard_kind)
        return round_rows(y, self.code_dtype) if self.fp4_group is None else round_rows_fp4(y, self.fp4_group)

    def empty(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Uninitialised codes [M, k] and scale [M] for the rows of `x`."""
        codes = torch.empty((x.shape[0], k), dtype=self.code_dtype, device=x.device)
        return codes, torch.empty((x.shape[0],), dtype=torch.float32, device=x.device)


def join_vectors(pre_scale: Tensor | None, signs: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The pre_scale and signs of the same transform with one vector in the place of two, which kernels read once:
    products with +-1 are exact."""
    return (pre_scale, signs) if pre_scale is None or signs is None else (pre_scale * signs, None)


def make_transform(
    op: str, pre_scale: Tensor | None, signs: Tensor | None, block_size: int, hadamard_kind: str, out: str
) -> Transform:
    """The transform that ends in a form of `FORMS`."""
    if out not in FORMS:
        raise unfit(op, f"out to be one of {', '.join(FORMS)}", repr(out))
    return Transform(pre_scale, signs, block_size, hadamard_kind, *FORMS[out])


def parse_transform(op: str, tensors: list[Tensor], block_size: int, hadamard_kind: str, out: str) -> Transform:
    """The transform of an op's list: an fp32 pre_scale or int8 signs, told apart by dtype, or both in this order."""
    kinds = [t.dtype for t in tensors]
    if kinds not in KINDS:
        found = [describe(t) for t in tensors]
        raise unfit(op, "transform to be [], [pre_scale], [signs] or [pre_scale, signs], fp32 and int8", found)
    pre_scale = tensors[0] if torch.float32 in kinds else None
    signs = tensors[-1] if torch.int8 in kinds else None
    return make_transform(op, pre_scale, signs, block_size, hadamard_kind, out)
