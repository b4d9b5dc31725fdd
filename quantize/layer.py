"""One layer as tensors: what a `LayerSpec` stores, how it is run, and the dense weight it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Container

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.hadamard import hadamard
from ..kernels.int8_linear_low_rank import OP as LOW_RANK
from ..kernels.int8_linear_low_rank import int8_linear_low_rank
from ..kernels.low_rank_down import act_down
from .errors import InputError
from .format import TensorLayout, Tensors, activation_codes, activation_ops
from .spec import FormatSpec, LayerSpec

LOW_RANK_DTYPE = torch.bfloat16


def check_shape(n: int, k: int, spec: LayerSpec, layer: str) -> None:
    """Raises InputError, naming `layer`, when a weight [n, k] cannot be held by `spec`."""
    try:
        spec.weight.resolve().check(k, spec.weight)
        if spec.activation is not None:
            _check_activation(k, spec.activation)
    except InputError as error:
        raise InputError(f"layer {layer} [{n}, {k}] as {spec.name}: {error}") from None
    if spec.hadamard is not None and k % spec.hadamard.block_size:
        raise InputError(f"layer {layer}: Hadamard block {spec.hadamard.block_size} does not divide K = {k}")
    if spec.rank > min(n, k):
        raise InputError(f"layer {layer}: rank {spec.rank} exceeds the smaller side of [{n}, {k}]")


def _check_activation(k: int, spec: FormatSpec) -> None:
    """Raises InputError when tokens of `k` elements cannot be rounded to the format one by one."""
    fmt = spec.resolve()
    fmt.check(k, spec)
    if fmt.stacked:
        raise InputError(f"format {spec.format} has one {fmt.stacked[0]} for all rows: it is for weights alone")


def weight_layout(n: int, k: int, spec: LayerSpec) -> dict[str, TensorLayout]:
    """Shape and dtype of the tensors that the weight's format alone stores."""
    return spec.weight.resolve().layout(n, k, spec.weight)


def layer_layout(n: int, k: int, spec: LayerSpec) -> dict[str, TensorLayout]:
    """Shape and dtype of every tensor a layer [n, k] stores, its bias excepted."""
    out = dict(weight_layout(n, k, spec))
    if spec.pre_scale:
        out["pre_quant_scale"] = TensorLayout((k,), torch.float32)
    if spec.hadamard is not None:
        out["hadamard_signs"] = TensorLayout((k,), torch.int8)
    if spec.rank:
        out["proj_down"] = TensorLayout((spec.rank, k), LOW_RANK_DTYPE)
        out["proj_up"] = TensorLayout((n, spec.rank), LOW_RANK_DTYPE)
    return out


def settled_spec(spec: LayerSpec, names: Container[str]) -> LayerSpec:
    """The spec of a layer of which these tensors are stored: one whose rotation was searched for may have none."""
    return spec if "hadamard_signs" in names else dataclasses.replace(spec, hadamard=None)


def layer_bytes(n: int, k: int, spec: LayerSpec) -> int:
    """Bytes stored for a weight [n, k]: codes, every scale, signs and the low-rank branch; not the bias."""
    return sum(t.nbytes for t in layer_layout(n, k, spec).values())


def rotate(x: Tensor, tensors: Tensors, spec: LayerSpec) -> Tensor:
    """x: float [M, K], already scaled, through the layer's block Hadamard; x itself when it has none."""
    if spec.hadamard is None:
        return x
    return hadamard(x, tensors["hadamard_signs"], spec.hadamard.block_size, spec.hadamard.kind)


def run_layer(x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
    """The layer itself: x float [M, K] -> [M, N] in x's dtype. This function is the definition of a `LayerSpec`."""
    if spec.pre_scale:
        x = x * tensors["pre_quant_scale"].to(x.dtype)
    rotated = rotate(x, tensors, spec)
    if spec.rank == 0:
        return spec.weight.resolve().linear(rotated, tensors, spec, bias)
    down, up = tensors["proj_down"], tensors["proj_up"]
    held = _int8_operands(rotated, tensors, spec)
    if held is not None:
        low = act_down(x, "none", None, down)
        return int8_linear_low_rank(*held, bias, [low, up], [], x.dtype)
    y = spec.weight.resolve().linear(rotated, tensors, spec, bias)
    return y + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def _int8_operands(x: Tensor, tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, ...] | None:
    """codes int8 [M, K] of x, their scale float32 [M], the weight int8 [N, K] and its scale float32 [N]; None where one
    of the two formats has no such form."""
    if activation_ops(spec.activation) is None:
        return None
    weight = spec.weight.resolve().to_int8(tensors, x.shape[-1], spec.weight)
    codes = None if weight is None else activation_codes(x, spec.activation)
    return None if weight is None or codes is None else (*codes, *weight)


def layer_ops(spec: LayerSpec) -> tuple[str, ...]:
    """Names of the kernel ops that `run_layer` calls, in order."""
    ops = spec.weight.resolve().ops(spec)
    if spec.rank and activation_ops(spec.activation) is not None and ops:
        joined = {"int8_linear": ("act_down", LOW_RANK), "int4_linear": ("int4_to_int8", "act_down", LOW_RANK)}
        ops = (*ops[:-1], *joined.get(ops[-1], ops[-1:]))
    return ops if spec.hadamard is None else ("hadamard", *ops)


def dense_weight(tensors: Tensors, k: int, spec: LayerSpec) -> Tensor:
    """float32 [N, K]: the weight W for which `x @ W.T` is this layer without activation quantisation."""
    weight = spec.weight.resolve().decode(tensors, k, spec.weight)
    if spec.hadamard is not None:  # the layer computes (x R) W^T, R = diag(signs) H, so the dense weight is W R^T
        ones = torch.ones_like(tensors["hadamard_signs"])
        weight = hadamard(weight, ones, spec.hadamard.block_size, spec.hadamard.kind)
        weight = weight * tensors["hadamard_signs"].to(weight.dtype)
    if spec.rank:
        weight = weight + tensors["proj_up"].float() @ tensors["proj_down"].float()
    if spec.pre_scale:
        weight = weight * tensors["pre_quant_scale"]
    return weight
