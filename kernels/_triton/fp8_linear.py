"""Triton twins of `quant_token_fp8` and `fp8_linear`."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_linear import lacks_fp8
from ..quant_token import FLOATS, TINY
from .int8_linear import grid, int8_options, tile_product
from .quant_token import MAX_K, quantize_by_token
from .tiles import INTERPRETED, ROUND_EACH_STEP, await_inputs, overlap, rows_contiguous, store_scaled, tile_ids


@triton.jit
def round_to_e4m3(t, INTERPRET: tl.constexpr):
    """|t| <= 448 -> e4m3, half to even."""
    if INTERPRET:
        # The interpreter's cast loses carries. Values already on the grid pass it unchanged.
        bits = t.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        small = (t + 24576.0) - 24576.0  # 1.5 * 2**14: to multiples of 2**-9, the smallest e4m3
        t = tl.where(tl.abs(t) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return t.to(tl.float8e4nv)


@triton.jit
def quant_token_fp8_kernel(
    x_ptr, codes_ptr, scale_ptr, K, TINY: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """One token per program; BLOCK >= K."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    # tl.max drops nan: as inf it makes the scale, and so every output of this token, not finite.
    amax = tl.maximum(tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=0), TINY)
    t = tl.minimum(tl.maximum(x * tl.div_rn(448.0, amax), -448.0), 448.0)
    tl.store(codes_ptr + row * K + k, round_to_e4m3(t, INTERPRET), mask=k < K)
    tl.store(scale_ptr + row, tl.div_rn(amax, 448.0))


@triton.jit(do_not_specialize=["M"])
def fp8_linear_kernel(
    x_ptr, w_ptr, scale_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """e4m3 x e4m3 -> fp32, one [BM, BN] tile per program; both operands K contiguous."""
    await_inputs()
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    acc = tile_product(x_ptr, w_ptr, pid_m, pid_n, M, N, K, tl.float32, EVEN_K, BM, BN, BK)
    store_scaled(
        y_ptr, acc, scale_ptr, weight_scale_ptr, bias_ptr, pid_m, pid_n, M, N,
        HAS_SCALE=True, HAS_BIAS=HAS_BIAS, BM=BM, BN=BN,
    )  # fmt: skip


def limits(
    op: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    k: int | None = None,
    **_: Any,
) -> str | None:
    """Why the kernels cannot take such an input; None when they can."""
    if dtype is not None and dtype not in (*FLOATS, torch.float8_e4m3fn):
        return f"dtype {dtype} is not supported"
    if op == "quant_token_fp8" and k is not None and k > MAX_K:
        return f"K={k} is larger than {MAX_K}"
    return None if device is None else lacks_fp8(device)


def supports(op: str, x: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors."""
    return limits(op, x.device, x.dtype, x.shape[1])


def fp8_options(m: int, n: int) -> dict[str, int]:
    """Tile for fp8 x fp8: that of int8, but by eight warps where it is 128 x 128. On sm_100 the sums come back from
    tensor memory all at once, and four warps would spill them."""
    options = int8_options(m, n)
    return options | {"num_warps": 8} if options["BM"] == options["BN"] == 128 else options


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_by_token(quant_token_fp8_kernel, x, torch.float8_e4m3fn, TINY=TINY, INTERPRET=INTERPRETED)


def _multiply(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    m, k = codes.shape
    n = weight.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=codes.device)
    if y.numel() == 0:
        return y
    options = fp8_options(m, n)
    fp8_linear_kernel[grid(m, n, options)](
        rows_contiguous(codes),
        rows_contiguous(weight),
        rows_contiguous(scale),
        rows_contiguous(weight_scale),
        weight_scale if bias is None else rows_contiguous(bias),
        y,
        m,
        n,
        k,
        HAS_BIAS=bias is not None,
        EVEN_K=k % options["BK"] == 0,
        **options,
        **ROUND_EACH_STEP,
        **overlap(y.device),
    )
    return y


def run(op: str, *args: Any) -> Any:
    """`quant_token_fp8` or `fp8_linear` by Triton."""
    return _quantize(*args) if op == "quant_token_fp8" else _multiply(*args)
