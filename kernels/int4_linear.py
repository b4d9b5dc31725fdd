"""Linear layers with packed int4 weights: int8 activations (W4A8) or float activations (W4A16).

Every layout decodes exactly to int8 with one fp32 scale per row, so that both ops equal decode + the int8 op.
"""

import torch
from torch import Tensor

from . import dispatch
from .int8_linear import check_codes, check_float, check_vectors, scaled_matmul, unfit, weight_only_matmul
from .op import define_op
from .pack import unpack_int4

GROUPS = (16, 32, 64, 128)


def check_rows(op: str, x: Tensor, group: int) -> None:
    """What an op takes that quantises float rows [M, K] in groups of `group`, or by row (0)."""
    check_float(op, x)
    k = x.shape[1]
    if k <= 0:
        raise unfit(op, "K > 0", f"K={k}")
    if group != 0 and group not in GROUPS:
        raise unfit(op, "group 0 (one scale per token), 16, 32, 64 or 128", group)
    if group != 0 and k % group != 0:
        raise unfit(op, f"K to be a multiple of the group {group}", f"K={k}")


def _check_weight(op: str, k: int, weight: Tensor, group_scale: Tensor | None) -> None:
    width = (k + 1) // 2
    ok = weight.dtype == torch.uint8 and weight.dim() == 2 and weight.shape[1] == width
    if not (ok and k > 0):
        raise unfit(op, f"packed weight torch.uint8 [N, {width}] for K={k}", weight)
    check_groups(op, weight.shape[0], k, group_scale)


def check_groups(op: str, n: int, k: int, group_scale: Tensor | None) -> None:
    """Check the optional group scales of a weight [n, k]."""
    if group_scale is None:
        return
    ok = group_scale.dtype == torch.uint8 and group_scale.dim() == 2 and group_scale.shape[0] == n
    if not ok:
        raise unfit(op, f"group_scale torch.uint8 [{n}, K/group]", group_scale)
    columns = group_scale.shape[1]
    fits = columns > 0 and k % columns == 0 and k // columns in GROUPS
    if not fits:
        raise unfit(op, f"group_scale columns that cut K={k} into groups of 16, 32, 64 or 128", f"{columns} columns")


def _decode(weight: Tensor, group_scale: Tensor | None, k: int) -> Tensor:
    q = unpack_int4(weight, k)
    if group_scale is None:
        return q
    n, columns = group_scale.shape
    wide = q.view(n, columns, k // columns).to(torch.int16)
    return wide.mul_(group_scale.to(torch.int16).unsqueeze(2)).add_(8).bitwise_right_shift_(4).to(torch.int8).view(n, k)


def _decode_reference(weight: Tensor, group_scale: Tensor | None, k: int) -> Tensor:
    _check_weight("int4_to_int8", k, weight, group_scale)
    return _decode(weight, group_scale, k)


@define_op("int4_to_int8")
def int4_to_int8(weight: Tensor, group_scale: Tensor | None, k: int) -> Tensor:
    """v[n, k] = q[n, k] without group_scale, else (q[n, k] * group_scale[n, k // g] + 8) >> 4 (arithmetic shift).

    weight: uint8 [N, ceil(K/2)], even k in the low nibble, two's complement
    group_scale: uint8 [N, K/g] with 4 fractional bits and g in 16, 32, 64, 128; or None
    returns: int8 [N, K], within [-127, 127]
    Raises ValueError when a shape or dtype does not fit, or group_scale's columns do not cut K into such groups.
    """
    return _decode_reference(weight, group_scale, k)


@int4_to_int8.register_fake
def _(weight: Tensor, group_scale: Tensor | None, k: int) -> Tensor:
    _check_weight("int4_to_int8", k, weight, group_scale)
    return weight.new_empty((weight.shape[0], k), dtype=torch.int8)


@int4_to_int8.register_cuda
def _(weight: Tensor, group_scale: Tensor | None, k: int) -> Tensor:
    _check_weight("int4_to_int8", k, weight, group_scale)
    return dispatch.run("int4_to_int8", _decode_reference, weight, group_scale, k)


def int4_to_int8_many(weight: Tensor, group_scale: Tensor | None, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """`int4_to_int8` of several weights that lie one behind another, such as those of a block, in one launch.

    Rows and groups are consecutive, so that the shapes of the weights do not matter to the decoding.

    weight: uint8 [sum of N * K/2]; group_scale: uint8 [sum of N * K/g], one g for all, or None
    shapes: (N, K) of each weight, every K a multiple of 128
    returns: int8 [N, K] for each, views of one buffer
    Raises ValueError when the sizes do not add up.
    """
    sizes = [n * k for n, k in shapes]
    if not all(k % 128 == 0 for _, k in shapes):
        raise unfit("int4_to_int8_many", "every K to be a multiple of 128", shapes)
    ok = weight.dim() == 1 and 2 * weight.numel() == sum(sizes)
    if not ok:
        raise unfit("int4_to_int8_many", f"packed weights torch.uint8 [{sum(sizes) // 2}]", weight)
    rows = sum(sizes) // 128
    if group_scale is not None:
        whole = group_scale.dim() == 1 and rows > 0 and group_scale.numel() % rows == 0
        if not whole:
            raise unfit("int4_to_int8_many", f"group scales torch.uint8 [{sum(sizes)}/group]", group_scale)
        group_scale = group_scale.view(rows, -1)
    flat = int4_to_int8(weight.view(rows, 64), group_scale, 128).view(-1)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def _check_int4(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    check_codes("int4_linear", codes, scale, out_dtype)
    _check_weight("int4_linear", codes.shape[1], weight, group_scale)
    check_vectors("int4_linear", weight.shape[0], weight_scale, bias)


def _reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_int4(codes, scale, weight, weight_scale, group_scale, bias, out_dtype)
    decoded = _decode(weight, group_scale, codes.shape[1])
    return scaled_matmul(codes, scale, decoded, weight_scale, bias, out_dtype)


@define_op("int4_linear")
def int4_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y[m, n] = (sum_k codes[m, k] * v[n, k]) * scale[m] * weight_scale[n] + bias[n], v from `int4_to_int8`.

    codes: int8 [M, K]; scale: fp32 [M], both from `quant_token`
    weight: uint8 [N, ceil(K/2)]; weight_scale: fp32 [N]
    group_scale: uint8 [N, K/g] or None
    bias: float [N] or None
    returns: out_dtype [M, N], bit-equal to `int8_linear` on the decoded weight
    Raises ValueError when a shape or dtype does not fit.
    """
    return _reference(codes, scale, weight, weight_scale, group_scale, bias, out_dtype)


@int4_linear.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_int4(codes, scale, weight, weight_scale, group_scale, bias, out_dtype)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=out_dtype)


@int4_linear.register_cuda
def _(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_int4(codes, scale, weight, weight_scale, group_scale, bias, out_dtype)
    return dispatch.run("int4_linear", _reference, codes, scale, weight, weight_scale, group_scale, bias, out_dtype)


def _check_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, group_scale: Tensor | None, bias: Tensor | None
) -> None:
    check_float("int4_weight_linear", x)
    _check_weight("int4_weight_linear", x.shape[1], weight, group_scale)
    check_vectors("int4_weight_linear", weight.shape[0], weight_scale, bias)


def _weight_only_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, group_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    _check_weight_only(x, weight, weight_scale, group_scale, bias)
    return weight_only_matmul(x, _decode(weight, group_scale, x.shape[1]), weight_scale, bias)


@define_op("int4_weight_linear")
def int4_weight_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, group_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """y[m, n] = (sum_k x[m, k] * v[n, k]) * weight_scale[n] + bias[n], v from `int4_to_int8`, accumulated in fp32.

    x: fp32 | bf16 | fp16 [M, K]
    weight: uint8 [N, ceil(K/2)]; weight_scale: fp32 [N]
    group_scale: uint8 [N, K/g] or None
    bias: float [N] or None
    returns: x.dtype [M, N]
    Raises ValueError when a shape or dtype does not fit.
    """
    return _weight_only_reference(x, weight, weight_scale, group_scale, bias)


@int4_weight_linear.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, group_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    _check_weight_only(x, weight, weight_scale, group_scale, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


@int4_weight_linear.register_cuda
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, group_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    _check_weight_only(x, weight, weight_scale, group_scale, bias)
    return dispatch.run("int4_weight_linear", _weight_only_reference, x, weight, weight_scale, group_scale, bias)
