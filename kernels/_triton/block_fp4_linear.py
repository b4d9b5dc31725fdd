"""Triton twin of `block_fp4_linear`, in two forms.

native   `tl.dot_scaled` on packed codes and block scales as they are: what the tensor cores of Blackwell multiply
decoded  both operands become bfloat16 inside of the loop, elements times block scales, exactly: any other GPU

Products of bfloat16 are exact in fp32, so that both forms are one sum in two orders. The native form was compiled and
its instructions inspected, for sm_100 and sm_120, but has not run on such a GPU: before its first use on one it must
give the decoded form's numbers, or that runs instead.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_scales import MX, NV
from ..dispatch import logger
from ..quant_token import FLOATS
from .int8_linear import dot_dtype, grid
from .quant_token_block_fp4 import e4m3_value
from .tiles import (
    COMPILED,
    INTERPRETED,
    ROUND_EACH_STEP,
    await_inputs,
    cuda_capability_geq,
    overlap,
    rows_contiguous,
    store_scaled,
    tile,
    tile_ids,
)

NATIVE = ((10, 0), (10, 3), (12, 0))
"""Compute capabilities for which Triton makes block-scaled instructions of both kinds of block."""

_native: dict[tuple[torch.device, int], str | None] = {}
"""(device, block) -> why the native form does not run there; None where it does."""


def _pair(out: int, codes: str, scale: int) -> str:
    """Two codes in 16-bit lanes to bf16: their bits where a bf16 has them, times 2^126, times the block's scale."""
    return f"""mul.lo.u32 bits, {codes}, 0x1040; and.b32 bits, bits, 0x81c081c0;
    fma.rn.bf16x2 bits, bits, power, zero; fma.rn.bf16x2 ${out}, bits, ${scale}, zero;"""


TO_BF16 = tl.constexpr(
    """{
    .reg .b32 low, high, p0, p1, p2, p3, bits, power, zero;
    mov.b32 power, 0x7e807e80; mov.b32 zero, 0x80008000;
    and.b32 low, $4, 0x0f0f0f0f; shr.b32 high, $4, 4; and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 p0, low, 0, 0x4140; prmt.b32 p1, low, 0, 0x4342;
    prmt.b32 p2, high, 0, 0x4140; prmt.b32 p3, high, 0, 0x4342;
    """
    + "".join(_pair(out, f"p{out}", 5 + out % 2) for out in range(4))
    + "}"
)
"""Four bytes to the bf16 elements of their low nibbles and those of their high nibbles, four scales beside them."""


@triton.jit
def element(code):
    """Low four bits of int32 -> fp32, E2M1: exponent and mantissa where fp32 has them, times 2**126."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def size_of(bits, GROUP: tl.constexpr):
    """uint8 bits of block scales -> fp32."""
    wide = bits.to(tl.int32)
    if GROUP == 32:
        size = tl.where(wide > 0, wide << 23, 1 << 22).to(tl.float32, bitcast=True)
        size = tl.where(wide < 255, size, float("nan"))
    else:
        size = e4m3_value(wide)
    return size


@triton.jit
def decoded(packed, bits, GROUP: tl.constexpr, DOT: tl.constexpr):
    """uint8 [R, B] of two codes and uint8 [R, C] of scales -> the even elements and the odd ones, DOT [R, B]."""
    size = size_of(bits, GROUP).to(DOT)[:, :, None]
    sizes = tl.reshape(tl.broadcast_to(size, (bits.shape[0], bits.shape[1], GROUP // 2)), packed.shape)
    if COMPILED and cuda_capability_geq(8, 0):
        even, odd = tl.inline_asm_elementwise(
            TO_BF16, "=r,=r,=r,=r,r,r,r", [packed, sizes], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        codes = packed.to(tl.int32)
        even = (element(codes) * sizes.to(tl.float32)).to(DOT)
        odd = (element(codes >> 4) * sizes.to(tl.float32)).to(DOT)
    return even, odd


@triton.jit
def dot_blocks(x, x_bits, w, w_bits, acc, NATIVE: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr):
    """acc + x @ w.T of packed codes [BM, BK / 2] and [BN, BK / 2] and the bits of their block scales."""
    if NATIVE:
        if GROUP == 16:
            x_bits = x_bits.to(tl.float8e4nv, bitcast=True)
            w_bits = w_bits.to(tl.float8e4nv, bitcast=True)
        acc = tl.dot_scaled(x, x_bits, "e2m1", w.T, w_bits, "e2m1", acc)
    else:
        # The even channels and the odd ones are a product each, so that no element has to change its place.
        x_even, x_odd = decoded(x, x_bits, GROUP, DOT)
        w_even, w_odd = decoded(w, w_bits, GROUP, DOT)
        acc = tl.dot(x_even, w_even.T, acc, input_precision="ieee")
        acc = tl.dot(x_odd, w_odd.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M"])
def block_fp4_linear_kernel(
    x_ptr, x_block_ptr, scale_ptr, w_ptr, w_block_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, NATIVE: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile per program; GROUP 32: E8M0 block scales, 16: E4M3; it divides K."""
    await_inputs()
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rm = tl.minimum(pid_m * BM + tl.arange(0, BM), M - 1).to(tl.int64)[:, None]
    rn = tl.minimum(pid_n * BN + tl.arange(0, BN), N - 1).to(tl.int64)[:, None]
    rb = tl.arange(0, BK // 2)[None, :]
    rg = tl.arange(0, BK // GROUP)[None, :]
    x_at = x_ptr + rm * (K // 2) + rb
    w_at = w_ptr + rn * (K // 2) + rb
    x_block_at = x_block_ptr + rm * (K // GROUP) + rg
    w_block_at = w_block_ptr + rn * (K // GROUP) + rg
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
            x_bits = tl.load(x_block_at)
            w_bits = tl.load(w_block_at)
        else:
            x = tl.load(x_at, mask=k // 2 + rb < K // 2, other=0)
            w = tl.load(w_at, mask=k // 2 + rb < K // 2, other=0)
            x_bits = tl.load(x_block_at, mask=k // GROUP + rg < K // GROUP, other=0)
            w_bits = tl.load(w_block_at, mask=k // GROUP + rg < K // GROUP, other=0)
        acc = dot_blocks(x, x_bits, w, w_bits, acc, NATIVE, GROUP, DOT)
        x_at += BK // 2
        w_at += BK // 2
        x_block_at += BK // GROUP
        w_block_at += BK // GROUP
    store_scaled(
        y_ptr, acc, scale_ptr, weight_scale_ptr, bias_ptr, pid_m, pid_n, M, N,
        HAS_SCALE=True, HAS_BIAS=HAS_BIAS, BM=BM, BN=BN,
    )  # fmt: skip


def limits(op: str, dtype: torch.dtype | None = None, group: int | None = None, **_: Any) -> str | None:
    """Why neither form can take such an input; None when one can."""
    if dtype is not None and dtype not in (*FLOATS, torch.uint8):
        return f"dtype {dtype} is not supported"
    if group is not None and group not in (MX, NV):
        return f"blocks of {group} are not supported"
    return None


def supports(op: str, codes: Tensor, *_: Any) -> str | None:
    """`limits` of these tensors; the op has checked the blocks."""
    return limits(op, dtype=codes.dtype)


def native_limits(device: torch.device, group: int) -> str | None:
    """Why the native form does not run on `device`; None where it does. Runs it once where it can."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    found = device, group
    if found not in _native:
        reason = _unfit(device)
        if reason is None and torch.cuda.is_current_stream_capturing():
            return "not yet compared with the decoded form"
        _native[found] = _compare(device, group) if reason is None else reason
    return _native[found]


def _unfit(device: torch.device) -> str | None:
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return "block-scaled products need an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) not in NATIVE:
        known = ", ".join(f"{a}.{b}" for a, b in NATIVE)
        return f"block-scaled products need compute capability {known}; this GPU has {major}.{minor}"
    return None


def _compare(device: torch.device, group: int) -> str | None:
    """Why the native form is left: numbers other than the decoded form's, where every order of the sum is exact."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, rows: int, columns: int) -> Tensor:
        return torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.uint8).to(device)

    m, n, k = 200, 136, 416
    low, high = (126, 128) if group == MX else (52, 60)  # block scales from 0.5 to 2, or from 0.75 to 1.5
    x, w = ((draw(0, 255, rows, k // 2), draw(low, high, rows, k // group)) for rows in (m, n))
    ones = torch.ones(m, device=device)
    operands = (*x, ones, *w, ones[:n])
    try:
        outputs = [multiply(native, operands, None, torch.float32) for native in (True, False)]
        reason = None if torch.equal(*outputs) else "the block-scaled product gave other numbers than the decoded one"
    except Exception as error:  # of Triton or its compiler, which raises RuntimeError for what it cannot lower
        reason = f"the block-scaled product failed: {type(error).__name__}: {error}".splitlines()[0]
    if reason is not None:
        logger.warning("block_fp4_linear runs decoded on %s: %s", device, reason)
    return reason


def note(op: str, device: torch.device, group: int | None = None, **_: Any) -> str | None:
    """Which form runs where it is not the native one, and why."""
    reasons = [native_limits(torch.device(device), g) for g in ((MX, NV) if group is None else (group,))]
    reason = next(filter(None, reasons), None)
    return None if reason is None else f"decoded to bfloat16: {reason}"


def native_options(m: int, n: int) -> dict[str, int]:
    """Tile of the native form: its instructions have 128 rows."""
    return tile(128, 64 if m * n <= 128 * 128 * 132 else 128, 128, 8, 8, 3)


def decoded_options(m: int, n: int) -> dict[str, int]:
    """Tile of the decoded form: of the largest, two fit on a Hopper SM; one decodes while the other multiplies."""
    if m <= 16:
        return tile(16, 64, 128, 1, 4, 4)
    if m <= 64:
        return tile(64, 64, 128, 1, 4, 3)
    if m * n <= 128 * 128 * 132:
        return tile(64, 128, 64, 8, 4, 3)
    return tile(128, 128, 64, 8, 8, 3)


def multiply(native: bool, operands: tuple[Tensor, ...], bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Launch one of the forms. operands: codes, block scales and scales, of x and of the weight."""
    codes, block_scale, weight = operands[0], operands[1], operands[3]
    m, k, n = codes.shape[0], 2 * codes.shape[1], weight.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=codes.device)
    if y.numel() == 0:
        return y
    options = native_options(m, n) if native else decoded_options(m, n)
    dense = [rows_contiguous(t) for t in operands]
    block_fp4_linear_kernel[grid(m, n, options)](
        *dense,
        dense[-1] if bias is None else rows_contiguous(bias),
        y,
        m,
        n,
        k,
        HAS_BIAS=bias is not None,
        EVEN_K=k % options["BK"] == 0,
        NATIVE=native,
        GROUP=k // block_scale.shape[1],
        DOT=dot_dtype(torch.bfloat16),
        **options,
        **ROUND_EACH_STEP,
        **overlap(y.device),
    )
    return y


def run(op: str, *args: Any) -> Tensor:
    """`block_fp4_linear` by Triton."""
    *operands, bias, out_dtype = args
    codes, block_scale = operands[:2]
    native = native_limits(codes.device, 2 * codes.shape[1] // block_scale.shape[1]) is None
    return multiply(native, tuple(operands), bias, out_dtype)
