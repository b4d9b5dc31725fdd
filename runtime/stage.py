"""A stage: linear layers that read the same tensor, with what makes that tensor and what is done with the product.

    rows = stage.norm(x, ...) | stage.act(x, ...)   norm + modulation, or activation, + scale + rotation + quantisation
    outputs = stage.linear(rows)                    one product for all layers
    h = stage.add(rows, residual, gate)             the product, gated and added to the residual
    h, rows = after.norm_sum(stage.sum(rows, residual, gate), ...)      the last, and the first of the stage after it

Each line is one kernel where the layers allow it: their inputs are scaled, rotated and quantised alike, to int8 codes
with one scale for each token, and their weights are exactly int8; or all of it in fp8. For low-rank branches the first
line has another one, their down-projection, which reads what the codes are made of; the up-projection is the end of the
product. Where the layers do not allow it (a LoRA layer, float activations), the same calls run them as they are. What a
stage computes in one kernel it rounds once, at the end. Of int4 activations the first line is a chain of kernels, as of
a layer by itself, but run once for all of them. A product in fp8 is a vendor's, which adds nothing: `add` is a second
kernel behind it, and in `norm_sum` the norm's kernel adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import norm_quant as norms
from ..kernels.act_quant import act_quant, activated
from ..kernels.fp8_linear import E4M3, fp8_linear, lacks_fp8
from ..kernels.gate_add import gate_add
from ..kernels.int8_linear import int8_linear
from ..kernels.int8_linear_add import int8_linear_add
from ..kernels.int8_linear_low_rank import int8_linear_low_rank
from ..kernels.low_rank_down import act_down, norm_down
from ..kernels.transform import join_vectors
from ..quantize.format import activation_codes, activation_ops
from ..quantize.layer import rotate
from ..quantize.spec import LayerSpec
from .linear import CompressedLinear
from .parts import Part, Place, is_plain, is_stale, layers_at, merge, reads_alike


class Rows(NamedTuple):
    """The input of a stage: quantised ([M, K] codes and their scale [M]), or float [M, K] and no scale.

    lows: for each part of a stage the quantised input's exact values through its down-projections [M, L * R], or None
    """

    values: Tensor
    scale: Tensor | None
    dtype: torch.dtype
    lows: tuple[Tensor | None, ...] = ()


class Sum(NamedTuple):
    """`residual + gate[b] * branch`, to be added yet: residual and branch [M, N], gate [B, N] or None for ones. Without
    a branch, the residual is the sum."""

    residual: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension: "layer" or "rms"."""

    kind: str
    eps: float
    module: Any = None
    names: tuple[str, ...] = ()

    @property
    def affine(self) -> tuple[Tensor, ...]:
        """The affine parameters that the module has now: loading may put others in the place of those it had."""
        return tuple(getattr(self.module, name) for name in self.names)

    @staticmethod
    def knows(module: Any) -> bool:
        """Whether the module is a norm of a known kind."""
        return type(module).__name__ in _KINDS and _affine_names(module) != ("bias",)

    @classmethod
    def of(cls, module: Any) -> Norm:
        """The norm that a module computes. Raises KeyError for one that is not known."""
        return cls(_KINDS[type(module).__name__], float(module.eps or 0.0), module, _affine_names(module))


def _affine_names(module: Any) -> tuple[str, ...]:
    return tuple(name for name in ("weight", "bias") if getattr(module, name, None) is not None)


_KINDS = {"LayerNorm": "layer", "FP32LayerNorm": "layer", "RMSNorm": "rms"}


class Stage:
    """`places`: where every linear layer is that reads the stage's input, in the order of their outputs.

    Layers of one weight format are stored one after the other and multiplied at once; the layers' own buffers become
    views of that storage, so nothing is held twice and each layer still runs alone. Moving or replacing a layer's
    tensors is noticed, and the storage is made anew.
    """

    def __init__(self, *places: Place) -> None:
        self.places = places
        self.parts: list[Part] = []
        self.vectors: tuple[Tensor | None, Tensor | None] = (None, None)
        self.keeps: Callable[[], bool] = bool  # () -> False: the layers may be stored together anew
        self.k = int(self.layers[0].in_features)  # type: ignore[arg-type]

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        return layers_at(self.places)

    def refusal(self) -> str | None:
        """Why the layers cannot be fused; None when they can."""
        first, *others = self.layers
        if reason := next((r for r in map(_refusal, (first, *others)) if r is not None), None):
            return reason
        if not all(reads_alike(first, layer) for layer in others):
            return "layers that read one tensor scale, rotate or quantise it differently"
        return None

    def ready(self) -> bool:
        """Whether the layers are fused; fuses them when their tensors have been moved or replaced since."""
        layers = self.layers
        if not all(map(is_plain, layers)):
            return False
        if not torch.compiler.is_compiling() and is_stale(layers, self.parts):
            if self.keeps():
                self.forget()
                return False
            self.parts = [] if self.refusal() is not None else merge(layers)
            if self.parts:
                buffers = layers[0]._buffers
                self.vectors = join_vectors(buffers.get("pre_quant_scale"), buffers.get("hadamard_signs"))
        return len(self.parts) > 0

    def forget(self, *_: Any) -> None:
        """Nothing of how the layers were stored together counts any more: other tensors were loaded."""
        self.parts = []

    def norm(self, x: Tensor, norm: Norm, shift: Tensor | None = None, scale: Tensor | None = None) -> Rows:
        """x: float [M, K] normalised, then `* (1 + scale[b]) + shift[b]` with shift and scale [B, K], B dividing M."""
        mod = [] if shift is None or scale is None else [shift, scale]
        fused = self.ready()
        form = self._form() if fused else None
        if form is None:
            y = norms.Norm(mod, list(norm.affine), norm.kind, norm.eps).apply(x)
            return self._rows(y.to(x.dtype), fused)
        codes, row_scale = norms.NORM_QUANT[form](x, mod, *self._norm_end(norm))
        return Rows(codes, row_scale, x.dtype, self._norm_lows(x, norm, mod))

    def norm_sum(
        self, total: Sum, norm: Norm, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Rows]:
        """The sum [M, K], and `norm` of it."""
        form = self._form() if total.branch is not None and self.ready() else None
        if form in norms.GATE_NORM_QUANT:
            mod = [] if shift is None or scale is None else [shift, scale]
            stream = [t for t in total if t is not None]
            h, codes, row_scale = norms.GATE_NORM_QUANT[form](stream, mod, *self._norm_end(norm))
            return h, Rows(codes, row_scale, h.dtype, self._norm_lows(h, norm, mod))
        h = value_of(total)
        return h, self.norm(h, norm, shift, scale)

    def act(self, x: Tensor, act: str = "none", prefix: Tensor | None = None) -> Rows:
        """x: float [M, K], or [M, 2K] for a gated activation, through the activation function called `act`; beside the
        columns of `prefix` [M, P], when given, which come first and as they are."""
        fused = self.ready()
        form = self._form() if fused else None
        if form is None:
            y = activated(x, act)
            return self._rows(y if prefix is None else torch.cat([prefix, y], dim=1), fused)
        codes, row_scale = act_quant(x, act, *self._transform(), form, prefix)
        own = self.layers[0]._buffers.get("pre_quant_scale")
        return Rows(codes, row_scale, x.dtype, self._lows(lambda down: act_down(x, act, own, down, prefix)))

    def _norm_lows(self, x: Tensor, norm: Norm, mod: list[Tensor]) -> tuple[Tensor | None, ...]:
        own = self.layers[0]._buffers.get("pre_quant_scale")
        return self._lows(lambda down: norm_down(x, mod, list(norm.affine), own, down, norm.kind, norm.eps))

    def _form(self) -> str | None:
        """The form of `kernels.transform.FORMS` that the input gets; None where it is quantised by itself."""
        spec = self.layers[0].spec
        assert isinstance(spec, LayerSpec)
        assert spec.activation is not None
        return spec.activation.resolve().row_form(spec.activation)

    def _rows(self, y: Tensor, fused: bool) -> Rows:
        """y: float [M, K] as the layers read it; quantised once for all of them if they are `fused`."""
        if not fused:
            return Rows(y, None, y.dtype)
        first = self.layers[0]
        assert isinstance(first, CompressedLinear)
        scaled = y * first.tensors()["pre_quant_scale"].to(y.dtype) if first.spec.pre_scale else y
        held = activation_codes(rotate(scaled, first.tensors(), first.spec), first.spec.activation)
        assert held is not None
        return Rows(*held, y.dtype, self._lows(lambda down: act_down(scaled, "none", None, down)))

    def _lows(self, project: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        return tuple(None if part.down is None else project(part.down) for part in self.parts)

    def linear(self, rows: Rows) -> list[Tensor]:
        """The output [M, N] of every layer, in order. Outputs of one product are views of it."""
        if rows.scale is None:
            return self._products(rows)
        pairs = zip(self.parts, self._products(rows), strict=True)
        return [y for part, product in pairs for y in product.split(part.sizes, dim=1)]

    def product(self, rows: Rows) -> Tensor:
        """[M, N_1 + N_2 + ...]: the outputs of all layers side by side."""
        products = self._products(rows)
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def _products(self, rows: Rows) -> list[Tensor]:
        """One tensor for each part, or for each layer where they are not fused."""
        if rows.scale is None:
            return [layer(rows.values) for layer in self.layers]
        found = []
        for part, low in zip(self.parts, rows.lows, strict=True):
            is_fp8 = rows.values.dtype == E4M3
            args = (rows.values, rows.scale, *_weight(part, self.k, is_fp8), part.bias)
            if low is None:
                found.append((fp8_linear if is_fp8 else int8_linear)(*args, rows.dtype))
            else:
                found.append(int8_linear_low_rank(*args, part.branch(low), [], rows.dtype))
        return found

    def add(self, rows: Rows, residual: Tensor, gate: Tensor | None = None) -> Tensor:
        """`residual + gate[b] * layer(rows)` for a stage of one layer: residual [M, N], gate [B, N] or None."""
        return value_of(self.sum(rows, residual, gate))

    def sum(self, rows: Rows, residual: Tensor, gate: Tensor | None = None) -> Sum:
        """As `add`, which is left to what reads the sum where the product cannot do it."""
        if rows.scale is None or rows.values.dtype == E4M3:
            return Sum(residual, self._products(rows)[0], gate)
        part, low = self.parts[0], rows.lows[0]
        args = (rows.values, rows.scale, *_weight(part, self.k), part.bias)
        if low is None:
            return Sum(int8_linear_add(*args, residual, gate))
        stream = [residual] if gate is None else [residual, gate]
        return Sum(int8_linear_low_rank(*args, part.branch(low), stream, residual.dtype))

    def _norm_end(self, norm: Norm) -> tuple[Any, ...]:
        """The arguments of a producer of `NORM_QUANT` after its modulation."""
        pre_scale, signs, *rotation = self._transform()
        transform = [t for t in (pre_scale, signs) if t is not None]
        return list(norm.affine), transform, norm.kind, norm.eps, *rotation

    def _transform(self) -> tuple[Tensor | None, Tensor | None, int, str]:
        """pre_scale, signs, block_size and kind of the rotation: what is done to the input before it is quantised."""
        spec = self.layers[0].spec
        assert isinstance(spec, LayerSpec)
        if spec.hadamard is None:
            return *self.vectors, 0, "sylvester"
        return *self.vectors, spec.hadamard.block_size, spec.hadamard.kind


def value_of(total: Sum) -> Tensor:
    """The sum itself [M, N]."""
    return total.residual if total.branch is None else gate_add(total.residual, total.branch, total.gate)


def _refusal(layer: nn.Module) -> str | None:
    if not is_plain(layer):
        return "a layer is not compressed, or is wrapped"
    assert isinstance(layer, CompressedLinear)
    spec = layer.spec
    if spec.activation is None:
        return "activations stay in the compute dtype"
    form = spec.activation.resolve().row_form(spec.activation)
    if form is None and activation_ops(spec.activation) is None:
        return f"activations in {spec.activation.format} have no int8 codes"
    tensors = {name: t.to("meta") for name, t in layer.tensors().items()}
    fmt, is_fp8 = spec.weight.resolve(), form == "fp8"
    if (fmt.to_fp8 if is_fp8 else fmt.to_int8)(tensors, layer.in_features, spec.weight) is None:
        return f"format {spec.weight.format} is not exact in {'fp8' if is_fp8 else 'int8'}"
    if is_fp8 and spec.rank:
        return "no fp8 product adds a low-rank branch"
    device = layer.tensors()["weight"].device
    # of a model on the meta device, which is only looked at, this machine's GPU is asked
    return lacks_fp8(torch.device("cuda") if device.type == "meta" else device) if is_fp8 else None


def _weight(part: Part, k: int, is_fp8: bool = False) -> tuple[Tensor, Tensor]:
    fmt = part.spec.resolve()
    found = (fmt.to_fp8 if is_fp8 else fmt.to_int8)(part.tensors, k, part.spec)
    assert found is not None
    return found
