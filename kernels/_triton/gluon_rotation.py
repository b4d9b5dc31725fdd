"""A tile times a block Hadamard matrix, on NVIDIA GPUs and without leaving the registers.

The matrix is a product over the bits of the channel number, so each bit can be dealt with where it is. Sums and
differences in fp32 (the fast Walsh-Hadamard transform) take those within a thread, shuffles those between lanes. But a
shuffle costs four additions. Tensor cores take four bits at once, two of the lane's number and two of the register's:
two instructions multiply 16 groups of 16 channels by the matrix of 16, and leave every product where its channel was.
Channels are rounded to bfloat16 for it; +-1 is exact, and sums are fp32.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_layout import held_by_thread, log2, thread_bits


@gluon.constexpr_function
def product_by_16(values):
    """PTX, a line for each register p that it sets, and where the results are: the lowest two bits of the register's
    number and of the lane's, of which there are `lane` and `zero`, times H of 16 on tensor cores."""
    lines: list[str] = []

    def put(code, *operands):
        """One instruction; its result goes to a register of its own, whose name this returns."""
        lines.append(f"{code} p{len(lines)}, {', '.join(operands)};")
        return f"p{len(lines) - 1}"

    def multiply(a, b):
        """a b; returns where the sums are."""
        sums = [f"p{len(lines) + i}" for i in range(4)]
        code = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        groups = ", ".join("{" + ", ".join(group) + "}" for group in (sums, a, b, ["zero"] * 4))
        lines.extend([f"{code} {groups};", "", "", ""])
        return sums

    # H as an operand: +-1 twice, and their negatives. Row k and column c are (half, lane, lane, pair); lane l has rows
    # 2 (l % 4) and the next in column l / 4.
    common = put("and.b32", put("and.b32", put("shr.b32", "lane", "3"), "lane"), "3")
    odd = put("popc.b32", common)
    second = put("shl.b32", put("xor.b32", odd, put("shr.b32", "lane", "2")), "31")
    first = put("shl.b32", put("and.b32", odd, "1"), "15")
    plus = put("xor.b32", put("xor.b32", first, second), "0x3f803f80")
    minus = put("xor.b32", plus, "0x80008000")
    # Registers 0 to 7 of each eight are (row, half, pair) of the operands.
    two = [put("cvt.rn.bf16x2.f32", values[i + 1], values[i]) for i in range(0, len(values), 2)]
    results = list(values)
    for start in range(0, len(values), 8):
        a = [two[start // 2 + i] for i in (0, 2, 1, 3)]
        for half in range(2):
            sums = multiply(a, (plus, (plus, minus)[half]))
            for row in range(2):
                for pair in range(2):
                    results[start + 4 * row + 2 * half + pair] = sums[2 * row + pair]
    return lines, results


@gluon.constexpr_function
def rotation(width, warps, block, held, regular, product):
    """PTX that multiplies the block of a thread and its neighbours by H; see `hadamard.SEEDS`.

    product: by tensor cores, where four bits lie as these need them
    """
    inside, rest = thread_bits(width, warps, block, held)
    # Where each bit of the channel number is: a bit of the register's number, or of the lane's.
    places = [(1 << inside.index(b), 0) if b in inside else (0, 1 << rest.index(b)) for b in range(log2(block))]
    lines: list[str] = []
    n = 1 << len(inside)

    def put(code, *operands):
        """One instruction; its result goes to a register of its own, whose name this returns."""
        lines.append(f"{code} t{len(lines)}, {', '.join(operands)};")
        return f"t{len(lines) - 1}"

    def add_other(value, lane, factor):
        """value * factor + what the lane holds whose number differs in this bit."""
        other = put("shfl.sync.bfly.b32", value, str(lane), "0x1f", "0xffffffff")
        return put("fma.rn.f32", value, factor, other)

    def pairs(values, register, lane):
        """a + b and a - b for two channels that differ in one bit; never fused with a product before, of which only one
        of the two would be."""
        if register == 0:
            # +-1.0: its sign is the bit of the lane's number.
            shifted = put("shl.b32", "lane", str(31 - log2(lane)))
            factor = put("lop3.b32", shifted, "0x80000000", "0x3f800000", "0xea")
            return [add_other(value, lane, factor) for value in values]
        results = list(values)
        for i in range(n):
            if not i & register:
                results[i] = put("add.rn.f32", values[i], values[i | register])
                results[i | register] = put("sub.rn.f32", values[i], values[i | register])
        return results

    def quads(values, digit):
        """sum - 2 x for four channels that differ in two bits."""
        sums = list(values)
        for register, lane in sorted(digit, reverse=True):
            if register == 0:
                added = {value: add_other(value, lane, "0f3F800000") for value in dict.fromkeys(sums)}
                sums = [added[value] for value in sums]
            for i in range(n):
                if register and not i & register:
                    sums[i] = put("add.rn.f32", sums[i], sums[i | register])
                    sums[i | register] = sums[i]
        return [put("fma.rn.f32", values[i], "0fC0000000", sums[i]) for i in range(n)]

    values = [f"${n + i}" for i in range(n)]
    multiplied: list[str] = []
    if product and not regular and {(0, 1), (0, 2)} <= set(places):
        multiplied, values = product_by_16(values)
        places = [place for place in places if place not in ((1, 0), (2, 0), (0, 1), (0, 2))]
    for i in range(0, len(places), 2 if regular else 1):
        values = quads(values, places[i : i + 2]) if regular else pairs(values, places[i][0], places[i][1])
    moves = [f"mov.b32 ${i}, {value};" for i, value in enumerate(values)]
    head = (
        f".reg .b32 lane, zero, p<{len(multiplied) + 1}>, t<{len(lines) + 1}>; mov.u32 lane, %laneid; mov.b32 zero, 0;"
    )
    return " ".join(["{", head, *filter(None, multiplied), *lines, *moves, "}"])


@gluon.constexpr_function
def floats(n):
    """Constraints of n results and n operands in fp32 registers."""
    return ",".join(["=f"] * n + ["f"] * n)


@gluon.jit
def rotate(y, T: gl.constexpr):
    """y [R, WIDTH] times H (of +-1) in every block of channels."""
    WIDTH: gl.constexpr = y.shape[1]
    ASM: gl.constexpr = rotation(WIDTH, T.warps, T.block, T.held, T.regular, T.product)
    N: gl.constexpr = held_by_thread(WIDTH, T.warps, T.block, T.held)
    return gl.inline_asm_elementwise(ASM, floats(N), [y], dtype=gl.float32, is_pure=True, pack=N)
