"""What a number format is: pure functions from a matrix to plain tensors and back, in a layout no kernel dictates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

if TYPE_CHECKING:
    from .spec import FormatSpec, LayerSpec

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TensorLayout:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Format:
    """A number format for a matrix [N, K] (a weight, or the rows of an activation).

    A new format is one file in `formats/` that exports `FORMAT`: it gives `tag`, `layout`, `encode` and `decode`.
    `linear` is optional: without it the layer decodes the weight and uses `F.linear`, correct on any device.
    """

    tag: ClassVar[str]
    by_rows: ClassVar[bool] = False  # every stored tensor has one row an output: layers concatenate by concatenating,
    shared: ClassVar[tuple[str, ...]] = ()  # but for these tensors, of which layers that join must have the same
    stacked: ClassVar[tuple[str, ...]] = ()  # not by rows for these alone: a layer has one, joined layers one each, and
    # `weight_owner` uint8 [N], which is never stored, says whose a row is
    group_sizes: ClassVar[Sequence[int | None]] = (None,)
    refusal: ClassVar[str] = ""  # why rounding a model to it needs `--i-know`, and what to do instead

    def check(self, k: int, spec: FormatSpec) -> None:
        """Raises InputError when rows of `k` elements cannot be held with this granularity."""
        if spec.group_size not in self.group_sizes:
            known = ", ".join("one scale per row" if g is None else str(g) for g in self.group_sizes)
            raise InputError(f"format {spec.format}: group size {spec.group_size} is not supported (known: {known})")
        if spec.group_size is not None and k % spec.group_size:
            fits = [str(g) for g in self.group_sizes if g is not None and k % g == 0]
            none = "none (use one scale per row)" if None in self.group_sizes else f"none that {spec.format} has"
            raise InputError(
                f"group size {spec.group_size} does not divide K = {k}; sizes that do: {', '.join(fits) or none}"
            )

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        """Shape and dtype of every tensor that a weight [n, k] is stored as."""
        raise NotImplementedError

    def encode(self, weight: Tensor, spec: FormatSpec) -> Tensors:
        """weight: float [N, K] -> the stored tensors, by rounding to nearest."""
        raise NotImplementedError

    def decode(self, tensors: Tensors, k: int, spec: FormatSpec) -> Tensor:
        """The stored tensors -> float32 [N, K]."""
        raise NotImplementedError

    def round(self, x: Tensor, spec: FormatSpec) -> Tensor:
        """x: float [N, K] -> float32 [N, K]: what `encode` and `decode` make of it."""
        return self.decode(self.encode(x, spec), x.shape[-1], spec)

    def to_int8(self, tensors: Tensors, k: int, spec: FormatSpec) -> tuple[Tensor, Tensor] | None:
        """int8 [N, K] codes and float32 [N] scales that are *exactly* this weight; None when there are none.

        A format that has them runs on 8-bit tensor cores, with every fused kernel the 8-bit formats have.
        """
        return None

    def to_fp8(self, tensors: Tensors, k: int, spec: FormatSpec) -> tuple[Tensor, Tensor] | None:
        """float8_e4m3fn [N, K] values and float32 [N] scales that are *exactly* this weight; None when there are none.
        As `to_int8`, for activations in fp8."""
        return None

    def quantize_rows(self, x: Tensor, spec: FormatSpec) -> tuple[Tensor, Tensor] | None:
        """As an activation format: x float [M, K] -> int8 codes [M, K] and float32 scales [M], whose product is what x
        is quantised to; None for a format without such a form, whose activations go through `encode` and `decode`."""
        return None

    def row_ops(self, spec: FormatSpec) -> tuple[str, ...] | None:
        """Names of the kernel ops that `quantize_rows` calls; None where it gives None."""
        return None

    def row_form(self, spec: FormatSpec) -> str | None:
        """As an activation format: which of `kernels.transform.FORMS` its rows have, those of `quantize_rows` where it
        gives any; fused producers write that too. None for no form of theirs."""
        return None

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        """Names of the kernel ops that `linear` calls; empty when it decodes and uses `F.linear`."""
        return ()

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        """x: float [M, K], already scaled and rotated -> [M, N] in x's dtype, activation quantisation included."""
        x = quantize_activation(x, spec.activation)
        weight = self.decode(tensors, x.shape[-1], spec.weight).to(x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


class ScalarFormat(Format):
    """A format whose elements are rounded one by one once the scales are known.

    Splitting `encode` into `fit` (the scales) and `quantize` (the codes) lets searches and error-feedback rounding
    (GPTQ) work on any such format's grid.
    """

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float = 1.0) -> Tensors:
        """The scale tensors of `weight` [N, K]. `clip` scales the covered range: a number, or [N, groups]. A format
        may have another default, which it then also gives as `own_clip`."""
        raise NotImplementedError

    def own_clip(self, weight: Tensor, spec: FormatSpec) -> Tensor | float:
        """What `fit` clips by when not told: a number, or float32 [N, groups]; above 1 where scales are coarse."""
        return 1.0

    def variants(self) -> Sequence[ScalarFormat]:
        """The formats that a row is one of where rows choose their own grid, each with that choice made; else this one.
        Searches look at each, and put the rows together with `merge`."""
        return (self,)

    def merge(self, first: Tensors, second: Tensors, rows: Tensor) -> Tensors:
        """The scales `first`, with those of `second` in the given rows (bool [N])."""
        return {
            name: t if name in self.shared else torch.where(rows if t.dim() == 1 else rows[:, None], second[name], t)
            for name, t in first.items()
        }

    def quantize(self, weight: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        """weight: float [N, K] -> codes int8 [N, K], nearest on the grid."""
        raise NotImplementedError

    def dequantize(self, codes: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        """codes: int8 [N, K] -> float32 [N, K]."""
        raise NotImplementedError

    def levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        """float32 [N, groups, L]: every value an element can take, ascending."""
        raise NotImplementedError

    def codes_of(self, index: Tensor) -> Tensor:
        """int64 indices into `levels` -> int8 codes."""
        raise NotImplementedError

    def index_of(self, codes: Tensor) -> Tensor:
        """Inverse of `codes_of`."""
        raise NotImplementedError

    def pack(self, codes: Tensor) -> Tensor:
        """codes: int8 [N, K] -> the stored `weight` tensor."""
        return codes

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        """Exact inverse of `pack`."""
        return packed

    def store(self, codes: Tensor, scales: Tensors) -> Tensors:
        return {"weight": self.pack(codes), **scales}

    def encode(self, weight: Tensor, spec: FormatSpec) -> Tensors:
        scales = self.fit(weight, spec)
        return self.store(self.quantize(weight.float(), scales, spec), scales)

    def round(self, x: Tensor, spec: FormatSpec) -> Tensor:
        scales = self.fit(x, spec)
        return self.dequantize(self.quantize(x.float(), scales, spec), scales, spec)

    def decode(self, tensors: Tensors, k: int, spec: FormatSpec) -> Tensor:
        scales = {name: t for name, t in tensors.items() if name != "weight"}
        return self.dequantize(self.unpack(tensors["weight"], k), scales, spec)


def group_count(k: int, spec: FormatSpec) -> int:
    return 1 if spec.group_size is None else k // spec.group_size


def group_of(k: int, spec: FormatSpec, device: torch.device) -> Tensor:
    """int64 [K]: the group that each element of a row belongs to."""
    return torch.arange(k, device=device) // (spec.group_size or k)


def quantize_activation(x: Tensor, spec: FormatSpec | None) -> Tensor:
    """x: float [M, K] quantised and dequantised by rows, in x's dtype; x itself when `spec` is None, or M is 0."""
    if spec is None or not len(x):
        return x
    fmt = spec.resolve()
    held = fmt.quantize_rows(x, spec)
    if held is not None:
        return _in_range(held[0].float() * held[1][:, None], x.dtype)
    rounded = fmt.round(x.float(), spec)
    return _in_range(rounded * row_gain(x, rounded)[:, None], x.dtype)


def _in_range(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """wide: float32 [M, K] -> `dtype`, where finite numbers stay finite: near the largest of float16, rounding up or a
    gain leads beyond it. Infinity stays, because it says that something overflowed before."""
    if dtype == wide.dtype:
        return wide
    limit = torch.finfo(dtype).max
    return torch.where(wide.isinf(), wide, wide.clamp(-limit, limit)).to(dtype)


def activation_codes(x: Tensor, spec: FormatSpec | None) -> tuple[Tensor, Tensor] | None:
    """`quantize_rows` of the activation format of a layer; None also for a layer without one."""
    return None if spec is None else spec.resolve().quantize_rows(x, spec)


def activation_ops(spec: FormatSpec | None) -> tuple[str, ...] | None:
    """`row_ops` of the activation format of a layer; None also for a layer without one."""
    return None if spec is None else spec.resolve().row_ops(spec)


def row_gain(x: Tensor, rounded: Tensor) -> Tensor:
    """float32 [M]: what each row of `rounded` is multiplied by so that its projection on the row of x [M, K] is that
    row: |x|^2 / <x, rounded>; 1 where they do not point the same way.

    Rounding that makes rows longer or shorter is an error of one direction, the same at every step of a sampler.
    """
    wide = x.float()
    along = (wide * rounded).sum(1)
    return torch.where(along > 0, wide.square().sum(1) / along, 1.0)
