"""Triton twins of `int8_weight_linear` and `int4_weight_linear`: float activations x low-bit weights.

Few tokens (a modulation layer sees one a sample): the time is that of reading the weight once. The product is done
transposed, W @ X^T, so that weights fill the tall side of the tensor core's tile, are converted in registers on their
way and never return to shared memory, and the tokens need padding to 16 only. Every output is one sum along K in steps
of 16, whatever the tile: up to `ALIKE` tokens it does not depend on their number.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_table
from ..quant_token import FLOATS
from .int4_decode import decode, group_of, measured_group
from .int4_decode import example as packed_example
from .int4_floats import int4_floats
from .int4_linear import matmul_decoding
from .int8_linear import dot_dtype, matmul_weight_only, weight_only_candidates
from .tiles import COMPILED, await_inputs, cuda_capability_geq, overlap, rows_contiguous, store_scaled

TUNABLE = ("int8_weight_linear", "int4_weight_linear")

SMALL = 64
"""Up to this many tokens the kernel of this file runs; float32 never does, it has no tensor cores at full precision."""

MANY = {"many": 1}
"""What a table's entries for more tokens than that have beside their shape: a neighbour may be one for fewer."""

ALIKE = 32
"""Up to this many tokens programs have one or two warps: Hopper's products of four warps sum in another order."""


@triton.jit(do_not_specialize=["M"])
def small_weight_kernel(
    x_ptr, w_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BN outputs of all M <= BM tokens per program."""
    await_inputs()
    pid = tl.program_id(0)
    rn = tl.minimum(pid * BN + tl.arange(0, BN), N - 1).to(tl.int64)
    rm = tl.arange(0, BM)
    inside = (rm < M)[None, :]
    rk = tl.arange(0, BK)
    x_at = x_ptr + rm[None, :] * K + rk[:, None]
    w_at = w_ptr + rn[:, None] * K + rk[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(0, K, BK):
        if EVEN_K:
            w = tl.load(w_at, eviction_policy="evict_first")
            x = tl.load(x_at, mask=inside, other=0.0, cache_modifier=".ca")
        else:
            w = tl.load(w_at, mask=(k + rk)[None, :] < K, other=0, eviction_policy="evict_first")
            x = tl.load(x_at, mask=inside & ((k + rk)[:, None] < K), other=0.0, cache_modifier=".ca")
        acc = tl.dot(w.to(DOT), x.to(DOT), acc, input_precision="ieee")
        x_at += BK
        w_at += BK
    store_scaled(
        y_ptr, acc.T, weight_scale_ptr, weight_scale_ptr, bias_ptr, 0, pid, M, N,
        HAS_SCALE=False, HAS_BIAS=HAS_BIAS, BM=BM, BN=BN,
    )  # fmt: skip


@triton.jit
def nibbles_dot(acc, packed, x, scale, GROUPED: tl.constexpr, FLOAT: tl.constexpr, DOT: tl.constexpr):
    """acc + w @ x for packed [BN, B] bytes of two codes and x [B, BM] words of two channels: the even channels and the
    odd ones are a product each, so that no code has to change its place."""
    if COMPILED and cuda_capability_geq(8, 0):
        low, high = int4_floats(packed, scale, GROUPED, DOT == tl.bfloat16)  # noqa: SIM300
    else:
        signed = packed.to(tl.int8, bitcast=True)
        low = (signed << 4) >> 4
        high = signed >> 4
        if GROUPED:
            low = ((low * scale[:, None] + 8) >> 4).to(tl.int8)
            high = ((high * scale[:, None] + 8) >> 4).to(tl.int8)
    even = x.to(tl.int16).to(FLOAT, bitcast=True)
    odd = (x >> 16).to(tl.int16).to(FLOAT, bitcast=True)
    acc = tl.dot(low.to(DOT), even.to(DOT), acc, input_precision="ieee")
    return tl.dot(high.to(DOT), odd.to(DOT), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["M"])
def small_int4_kernel(
    x_ptr, w_ptr, weight_scale_ptr, group_ptr, bias_ptr, y_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STEP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """As `small_weight_kernel`, STEP channels at a time, which have one group scale. STEP * UNROLL divides K."""
    await_inputs()
    pid = tl.program_id(0)
    rn = tl.minimum(pid * BN + tl.arange(0, BN), N - 1).to(tl.int64)
    rm = tl.arange(0, BM)
    inside = (rm < M)[None, :]
    rb = tl.arange(0, STEP // 2)
    x_at = x_ptr.to(tl.pointer_type(tl.int32)) + rm[None, :] * (K // 2) + rb[:, None]
    w_at = w_ptr + rn[:, None] * (K // 2) + rb[None, :]
    group_at = group_ptr + rn * (K // STEP)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for _ in range(0, K, STEP * UNROLL):
        for u in tl.static_range(UNROLL):
            packed = tl.load(w_at + u * (STEP // 2), eviction_policy="evict_first")
            x = tl.load(x_at + u * (STEP // 2), mask=inside, other=0, cache_modifier=".ca")
            scale = rn.to(tl.int32)
            if GROUP > 0:
                scale = tl.load(group_at + u).to(tl.int32)
            acc = nibbles_dot(acc, packed, x, scale, GROUP > 0, x_ptr.dtype.element_ty, DOT)
        x_at += STEP // 2 * UNROLL
        w_at += STEP // 2 * UNROLL
        group_at += UNROLL
    store_scaled(
        y_ptr, acc.T, weight_scale_ptr, weight_scale_ptr, bias_ptr, 0, pid, M, N,
        HAS_SCALE=False, HAS_BIAS=HAS_BIAS, BM=BM, BN=BN,
    )  # fmt: skip


def limits(op: str, dtype: torch.dtype | None = None, group: int | None = None, **_: Any) -> str | None:
    """Why the kernels cannot take such an input; None when they can."""
    if dtype is not None and dtype not in FLOATS:
        return f"dtype {dtype} is not supported"
    if group is not None and group not in (16, 32, 64, 128):
        return f"groups of {group} are not supported"
    return None


def supports(op: str, x: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors; the op has checked the groups."""
    return limits(op, dtype=x.dtype)


def small_tile(bn: int, bk: int, warps: int, stages: int) -> dict[str, int]:
    """Launch options of the kernel for few tokens: outputs a program, channels a step, warps, pipeline stages."""
    return {"BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}


def small_options(m: int, n: int) -> dict[str, int]:
    """Narrow programs while there are few, so that every SM has some; wide ones read the tokens less often."""
    if m > ALIKE:
        return small_tile(64, 128, 4, 4)
    return small_tile(64 if n > 1 << 14 else 32, 128, 2, 4)


def candidates(op: str, m: int, n: int, k: int) -> list[dict[str, int]]:
    """Launch options worth measuring; for many tokens and packed weights none, as those of other ops run."""
    if op == "int4_weight_linear":
        return small_int4_candidates(m, n, k)
    if m > SMALL:
        return weight_only_candidates()
    tiles = [(16, 256, 1, 4), (32, 256, 2, 4), (16, 128, 1, 6), (32, 128, 1, 6), (32, 128, 2, 4), (64, 128, 2, 4)]
    tiles += [(64, 128, 2, 6), (64, 128, 4, 4)] if m > ALIKE else [(64, 128, 2, 6)]
    return [small_tile(*sizes) for sizes in tiles]


def small_int4_candidates(m: int, n: int, k: int) -> list[dict[str, int]]:
    """What a table may hold for few tokens: the step follows from the group, and the order of the sums from it."""
    heuristic = small_int4_options(m, n, k, measured_group(k))
    if heuristic is None:
        return []
    unrolls = [u for u in (1, 2, 3, 4) if k % (heuristic["STEP"] * u) == 0]
    wide = [(32, 2), (32, 4), (64, 2), (64, 4)] if m > ALIKE else [(16, 1), (32, 1), (32, 2), (64, 2)]
    return [{"UNROLL": u, "BN": bn, "num_warps": warps, "num_stages": 3} for u in unrolls for bn, warps in wide]


def facts(op: str, m: int, k: int) -> dict[str, int]:
    """What the options depend on beside the shape, for an `example`: few tokens have a kernel of their own."""
    return {"group": measured_group(k)} if op == "int4_weight_linear" else MANY if m > SMALL else {}


def example(op: str, m: int, n: int, k: int, device: torch.device) -> tuple[Any, ...]:
    """Random arguments of the op."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    if op == "int4_weight_linear":
        packed, group_scale, _ = packed_example(op, m, n, k, device)
        return x, packed, torch.rand(n, device=device), group_scale, None
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    return x, weight, torch.rand(n, device=device), None


def matmul_small(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the kernel for few tokens on an int8 weight."""
    m, k = x.shape
    n = weight.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    options = launch_table.lookup("int8_weight_linear", x.device, m, n, k) or small_options(m, n)
    if m <= ALIKE and options["num_warps"] > 2:
        options = small_options(m, n)  # measured for more tokens: a table's entry serves its neighbours too
    small_weight_kernel[(triton.cdiv(n, options["BN"]),)](
        rows_contiguous(x),
        rows_contiguous(weight),
        rows_contiguous(weight_scale),
        weight_scale if bias is None else rows_contiguous(bias),
        y,
        m,
        n,
        k,
        HAS_BIAS=bias is not None,
        EVEN_K=k % options["BK"] == 0,
        DOT=dot_dtype(x.dtype),
        BM=max(16, triton.next_power_of_2(m)),
        **options,
        **overlap(x.device),
    )
    return y


def small_int4_options(m: int, n: int, k: int, group: int) -> dict[str, int] | None:
    """Launch options of the kernel for few tokens and packed weights; None where it does not run."""
    step = group or 64
    if m > SMALL or step < 32 or k % step:
        return None
    unroll = next(u for u in (2, 3, 1) if k % (step * u) == 0)
    # a program decodes about as fast as the others let it, however wide: as many as fill the GPU
    wide, warps = (64, 4) if m > ALIKE else (64 if n > 1 << 16 else 32, 2)
    return {"STEP": step, "UNROLL": unroll, "BN": wide, "num_warps": warps, "num_stages": 3}


def matmul_small_int4(
    x: Tensor, weight: Tensor, weight_scale: Tensor, group_scale: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Launch the kernel for few tokens on a packed weight; None where it does not run."""
    (m, k), n, group = x.shape, weight.shape[0], group_of(x.shape[1], group_scale)
    options = small_int4_options(m, n, k, group)
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    if options is None or x.dtype == torch.float32 or (x.data_ptr() | weight.data_ptr()) % 16:
        return None
    measured = launch_table.lookup("int4_weight_linear", x.device, m, n, k, group=group) if m else None
    if measured is not None and (m > ALIKE or measured["num_warps"] <= 2):  # as in `matmul_small`
        options |= measured
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if y.numel():
        small_int4_kernel[(triton.cdiv(n, options["BN"]),)](
            x, weight, rows_contiguous(weight_scale),
            weight if group_scale is None else rows_contiguous(group_scale),
            weight_scale if bias is None else rows_contiguous(bias), y, m, n, k,
            HAS_BIAS=bias is not None, GROUP=group, DOT=dot_dtype(x.dtype), BM=max(16, triton.next_power_of_2(m)),
            **options, **overlap(x.device),
        )  # fmt: skip
    return y


def _int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] <= SMALL and x.dtype != torch.float32:
        return matmul_small(x, weight, weight_scale, bias)
    return matmul_weight_only(x, weight, weight_scale, bias, _many_options(x, len(weight)))


def _many_options(x: Tensor, n: int) -> dict[str, int] | None:
    """What was measured for many tokens; float32 has no tensor cores at full precision, and is not."""
    m, k = x.shape
    if m <= SMALL or x.dtype == torch.float32:
        return None
    return launch_table.lookup("int8_weight_linear", x.device, m, n, k, **MANY)


def _int4(x: Tensor, weight: Tensor, weight_scale: Tensor, group_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    small = matmul_small_int4(x, weight, weight_scale, group_scale, bias)
    if small is not None:
        return small
    if x.shape[0] <= SMALL and x.dtype != torch.float32:
        return matmul_decoding(x, None, weight, weight_scale, group_scale, bias, x.dtype)
    decoded = decode(weight, group_scale, x.shape[1])
    return matmul_weight_only(x, decoded, weight_scale, bias, _many_options(x, len(weight)))


def run(op: str, *args: Any) -> Tensor:
    """`int8_weight_linear` or `int4_weight_linear` by Triton."""
    return _int8(*args) if op == "int8_weight_linear" else _int4(*args)
