"""Four-bit codes to bf16 or fp16 on NVIDIA GPUs, two in a register at a time, for `weight_linear.py`.

By way of int8 the product takes 18 instructions a code, most of them to unpack and to convert; this way 8, with equal
results (Hopper, 32 outputs a program). A code is worked on in a 16-bit lane: `q + 8`, times its group scale, with an
offset that keeps every value positive, so that no lane borrows from the other. The whole number u that is left becomes
a float by its bits: those of fp16 1024 (bf16: 128, sign apart, since only seven bits fit) with u in the mantissa, less
what is too much.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LANES = """
    .reg .b32 low, high, p0, p1, p2, p3, a, s, one;
    lop3.b32 low, $4, 0x0f0f0f0f, 0x08080808, 0x6a;
    shr.b32 high, $4, 4;
    lop3.b32 high, high, 0x0f0f0f0f, 0x08080808, 0x6a;
    prmt.b32 p0, low, 0, 0x4140;
    prmt.b32 p1, low, 0, 0x4342;
    prmt.b32 p2, high, 0, 0x4140;
    prmt.b32 p3, high, 0, 0x4342;
"""
"""q + 8 of eight codes in four bytes: the even ones in p0 and p1, the odd ones in p2 and p3."""


def _scaled(pair: int, first: int) -> str:
    """(q + 8) * scale + offset, over 16; `first`: the code of a pair whose operands serve both, of one row."""
    return f"mad.lo.u32 p{pair}, p{pair}, ${5 + first}, ${9 + first}; shr.b32 p{pair}, p{pair}, 4;"


def _to_bf16(pair: int, grouped: bool) -> str:
    if not grouped:  # q + 8 has four bits
        return f"or.b32 a, p{pair}, 0x43004300; mov.b32 s, 0xc308c308; fma.rn.bf16x2 ${pair}, a, one, s;"
    # q * scale + 128 = 128 s + m: 128 + m, less 128 where s is set and 256 where it is not
    return f"""lop3.b32 a, p{pair}, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 s, p{pair}, 0x00800080, 0xc380c380, 0x6a;
    fma.rn.bf16x2 ${pair}, a, one, s;"""


def _to_fp16(pair: int, grouped: bool) -> str:
    if not grouped:
        return f"or.b32 a, p{pair}, 0x64006400; mov.b32 s, 0x64086408; sub.f16x2 ${pair}, a, s;"
    return f"lop3.b32 a, p{pair}, 0x00ff00ff, 0x64006400, 0xea; mov.b32 s, 0x64806480; sub.f16x2 ${pair}, a, s;"


def _program(bf16: bool, grouped: bool) -> str:
    scaled = [_scaled(pair, 2 * (pair % 2)) for pair in range(4)] if grouped else []
    floats = [(_to_bf16 if bf16 else _to_fp16)(pair, grouped) for pair in range(4)]
    return "\n".join(["{", LANES, "mov.b32 one, 0x3f803f80;", *scaled, *floats, "}"])


TO_BF16 = tl.constexpr([_program(True, grouped) for grouped in (False, True)])
TO_FP16 = tl.constexpr([_program(False, grouped) for grouped in (False, True)])
OPERANDS = tl.constexpr("=r,=r,=r,=r,r," + ",".join("r" * 8))


@triton.jit
def int4_floats(packed, scale, GROUPED: tl.constexpr, BF16: tl.constexpr):
    """uint8 [N, B] of two codes and scale int32 [N] of their group -> the even channels and the odd ones, bf16 or fp16
    [N, B]. Four bytes that a thread holds one after another may lie in two rows, two in each."""
    scales = tl.broadcast_to(scale[:, None], packed.shape)
    offsets = tl.broadcast_to(((2056 - 8 * scale) * 0x10001)[:, None], packed.shape)
    if BF16:
        even, odd = tl.inline_asm_elementwise(
            TO_BF16[GROUPED], OPERANDS, [packed, scales, offsets], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            TO_FP16[GROUPED], OPERANDS, [packed, scales, offsets], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    return even, odd
