"""Floating-point elements of four bits whose every layer decodes *exactly* to int8 with one fp32 scale per row.

    E2M1  0 .5 1 1.5 2 3 4 6      the OCP element of MXFP4 and NVFP4
    E1M2  0 .5 1 1.5 2 2.5 3 3.5  evenly spaced
    E3M0  0 .25 .5 1 2 4 8 16     powers of two

A code is a sign (bit 3) and the place of the magnitude in its list. Times 16, 32 and 4 the lists are the integers of
`TABLES`, so that with v = TABLES[element][code] a row is `w = v * weight_scale[n]`, and with groups

    w = v' * weight_scale[n],   v' = (v * weight_group_scale[n, g] + 64) >> 7,   an int8 in [-127, 127].

The group scale is an unsigned 8-bit fixed-point number relative to the row's scale (see `quantize/integer.py`). A
product with int8 or FP4 activations is then an integer product with one fp32 scale per row in the epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.codebook_decode import GROUP_SHIFT, codebook_to_int8
from ..kernels.pack import pack_codes, unpack_codes
from ..kernels.quant_token_fp4 import quant_token_fp4
from .format import ScalarFormat, TensorLayout, Tensors, activation_ops, group_count, row_gain
from .integer import TINY, int8_form_linear
from .spec import FormatSpec, LayerSpec

ELEMENTS = ("e2m1", "e1m2", "e3m0")
VALUES = {
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "e1m2": (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5),
    "e3m0": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}
TABLES = {
    "e2m1": (0, 8, 16, 24, 32, 48, 64, 96),
    "e1m2": (0, 16, 32, 48, 64, 80, 96, 112),
    "e3m0": (0, 1, 2, 4, 8, 16, 32, 64),
}
"""Magnitudes as integers of at most seven bits."""
GROUP_LARGEST = {"e2m1": 169, "e1m2": 145, "e3m0": 254}
"""The group scale of a row's largest group: the largest for which v' stays within 127."""
ONE = 1 << GROUP_SHIFT


class Minifloat(ScalarFormat):
    """weight uint8 [N, ceil(K/2)], even k in the low nibble; weight_scale float32 [N]; weight_codebook int8 [T, 16, 1],
    the table of each element; with groups also weight_group_scale uint8 [N, K / group_size]; where a row may choose
    among several elements also weight_element uint8 [N], the number of its table.

    elements  those a row chooses from, by the squared error of its elements
    """

    by_rows = True
    shared = ("weight_codebook",)
    group_sizes = (None, 16, 32, 64, 128)

    def __init__(self, *elements: str) -> None:
        self.elements = elements

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        out = {
            "weight": TensorLayout((n, (k + 1) // 2), torch.uint8),
            "weight_scale": TensorLayout((n,), torch.float32),
            "weight_codebook": TensorLayout((len(self.elements), 16, 1), torch.int8),
        }
        if spec.group_size is not None:
            out["weight_group_scale"] = TensorLayout((n, group_count(k, spec)), torch.uint8)
        if len(self.elements) > 1:
            out["weight_element"] = TensorLayout((n,), torch.uint8)
        return out

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float = 1.0) -> Tensors:
        """As in `ScalarFormat`; each row gets the element with the least squared error at this `clip`."""
        best = self._fit_element(weight, spec, clip, 0)
        if len(self.elements) == 1:
            return best
        least = self._row_error(weight, best, spec)
        for number in range(1, len(self.elements)):
            other = self._fit_element(weight, spec, clip, number)
            error = self._row_error(weight, other, spec)
            best, least = self.merge(best, other, error < least), torch.minimum(error, least)
        return best

    def with_elements(self, element: Tensor | int) -> Minifloat:
        """This format with each row's element given: int64 [N], places in `elements`, or one for all rows."""
        return _Given(self, element)

    def variants(self) -> Sequence[ScalarFormat]:
        if len(self.elements) == 1:
            return (self,)
        return [self.with_elements(number) for number in range(len(self.elements))]

    def quantize(self, weight: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        levels = self._levels(scales, spec)  # [N, G, 15], integers
        target = weight / scales["weight_scale"].clamp_min(TINY)[:, None]
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        index = torch.searchsorted(middles, target.reshape(*levels.shape[:2], -1))
        return self.codes_of(index.view(target.shape))

    def dequantize(self, codes: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        levels = self._levels(scales, spec)
        level = levels.gather(2, self.index_of(codes).view(*levels.shape[:2], -1)).view(codes.shape)
        return level * scales["weight_scale"][:, None]

    def levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        return self._levels(scales, spec) * scales["weight_scale"][:, None, None]

    def codes_of(self, index: Tensor) -> Tensor:
        place = index - 7
        return torch.where(place < 0, 8 - place, place).to(torch.int8)

    def index_of(self, codes: Tensor) -> Tensor:
        magnitude = codes.long() & 7
        return 7 + torch.where(codes >= 8, -magnitude, magnitude)

    def pack(self, codes: Tensor) -> Tensor:
        return pack_codes(codes, 4)

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        return unpack_codes(packed, k, 4).to(torch.int8)

    def to_int8(self, tensors: Tensors, k: int, spec: FormatSpec) -> tuple[Tensor, Tensor]:
        element, group = tensors.get("weight_element"), tensors.get("weight_group_scale")
        return codebook_to_int8(tensors["weight"], tensors["weight_codebook"], element, group, k), tensors[
            "weight_scale"
        ]

    def quantize_rows(self, x: Tensor, spec: FormatSpec) -> tuple[Tensor, Tensor] | None:
        if self.elements == ("e2m1",):
            return quant_token_fp4(x, spec.group_size or 0)
        codes, scale = self.to_int8(self.encode(x, spec), x.shape[1], spec)
        return codes, scale * row_gain(x, codes.float() * scale[:, None])

    def row_ops(self, spec: FormatSpec) -> tuple[str, ...]:
        return ("quant_token_fp4",) if self.elements == ("e2m1",) else ("codebook_to_int8",)

    def row_form(self, spec: FormatSpec) -> str | None:
        if self.elements != ("e2m1",):
            return None
        return "fp4" if spec.group_size is None else f"fp4g{spec.group_size}"

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        rows = activation_ops(spec.activation)
        product = ("int8_weight_linear",) if rows is None else ("int8_linear",)
        return (*(rows or ()), "codebook_to_int8", *product)

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        """x: float [M, K] -> [M, N] in x's dtype."""
        return int8_form_linear(x, *self.to_int8(tensors, x.shape[-1], spec.weight), spec, bias)

    def _fit_element(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float, number: int) -> Tensors:
        element = self.elements[number]
        groups = weight.float().reshape(len(weight), group_count(weight.shape[1], spec), -1)
        reach = groups.abs().amax(-1) * clip
        scales = {"weight_codebook": codebook(self.elements).to(weight.device)}
        if len(self.elements) > 1:
            scales["weight_element"] = torch.full((len(weight),), number, dtype=torch.uint8, device=weight.device)
        largest = TABLES[element][-1]
        if spec.group_size is None:
            return {"weight_scale": (reach[:, 0] / largest).clamp_min(TINY), **scales}
        bound = GROUP_LARGEST[element]
        row = (reach.amax(1) / (largest * bound / ONE)).clamp_min(TINY)
        relative = (reach / row[:, None] / (largest / ONE) - 1e-3).ceil().clamp(1, bound)
        return {"weight_scale": row, "weight_group_scale": relative.to(torch.uint8), **scales}

    def _row_error(self, weight: Tensor, scales: Tensors, spec: FormatSpec) -> Tensor:
        error = self.dequantize(self.quantize(weight.float(), scales, spec), scales, spec) - weight
        return error.double().square().sum(1)  # float64: matrices far from 1 must not lose their squares

    def _levels(self, scales: Tensors, spec: FormatSpec) -> Tensor:
        """float32 [N, groups, 15]: the int8 levels of every row and group, ascending."""
        n, device = len(scales["weight_scale"]), scales["weight_scale"].device
        tables = ascending(self.elements).to(device)
        element = scales.get("weight_element")
        table = tables[:1].expand(n, -1) if element is None else tables[element.long()]
        if spec.group_size is None:
            return table[:, None].float()
        relative = scales["weight_group_scale"].float()[..., None]
        return torch.floor((table[:, None] * relative + ONE // 2) / ONE)


class _Given(Minifloat):
    """A `Minifloat` whose rows have their elements already."""

    def __init__(self, base: Minifloat, element: Tensor | int) -> None:
        super().__init__(*base.elements)
        self.element = element

    def fit(self, weight: Tensor, spec: FormatSpec, clip: Tensor | float = 1.0) -> Tensors:
        if isinstance(self.element, int):
            return self._fit_element(weight, spec, clip, self.element)
        best = self._fit_element(weight, spec, clip, 0)
        for number in range(1, len(self.elements)):
            best = self.merge(best, self._fit_element(weight, spec, clip, number), self.element == number)
        return best

    def variants(self) -> Sequence[ScalarFormat]:
        return (self,)


def element_rule(weight: Tensor) -> Tensor:
    """int64 [N]: the place in `ELEMENTS` of each row's element by HQ-DiT's rule (arXiv 2405.19751): the spread of a
    row, its largest magnitude over a small one, is held against the range of each element's magnitudes.

    The small magnitude is the lower quartile, for which a row of normal numbers gets E2M1 or E1M2; how the paper takes
    it is not published. The element whose range is nearest on a logarithmic scale is taken.
    """
    size = weight.float().abs()
    spread = (size.amax(1) / size.quantile(0.25, dim=1).clamp_min(TINY)).clamp(1, 1e6).log2()
    ranges = torch.tensor([VALUES[name][-1] / VALUES[name][1] for name in ELEMENTS], device=weight.device).log2()
    return (spread[:, None] - ranges).abs().argmin(1)


def codebook(elements: tuple[str, ...]) -> Tensor:
    """int8 [T, 16, 1]: the integer of every code of the given elements."""
    magnitudes = torch.tensor([TABLES[name] for name in elements], dtype=torch.int8)
    return torch.cat((magnitudes, -magnitudes), 1)[..., None]


def ascending(elements: tuple[str, ...]) -> Tensor:
    """float32 [T, 15]: the same integers in ascending order, zero once."""
    magnitudes = torch.tensor([TABLES[name] for name in elements], dtype=torch.float32)
    return torch.cat((-magnitudes[:, 1:].flip(1), magnitudes), 1)
