"""A tile times a block Hadamard matrix, on NVIDIA GPUs and without leaving the registers.

The matrix is a product over the bits of the channel number, so each bit can be dealt with where it is. Sums and
differences in fp32 (the fast Walsh-Hadamard transform) take those within a thread, shuffles those between lanes. But a
shuffle costs four additions. Tensor cores take four bits at once, two of the lane's number and two of the register's:
two instructions multiply 16 groups of 16 channels by the matrix of 16, and leave every product where its channel was.
Channels are rounded to bfloat16 for it; +-1 is exact, and sums are fp32.

Behind a norm, whose range is known, blocks of 64 and 128 are multiplied `crosswise`: twice. The first product takes
two bits of the lane's number and two of the register's and leaves them where the other three bits of the lane's number
were, and those where they were, so that the second one can take these. Its operand is rounded to fp16, with eight times
the precision of bfloat16 but little range, which is why the first one is of H / 256: what a norm makes may be as large
as 2**20, and about 1/250 in the mean before digits are lost. Channels end up elsewhere (`in_order`).
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_layout import held_by_thread, log2, thread_bits


@gluon.constexpr_function
def writer(prefix):
    """Lines of PTX, one for each register of this prefix that they set, and what adds to them: an instruction, and a
    product of tensor cores. Both use registers of their own, whose names they return."""
    lines: list[str] = []

    def put(code, *operands):
        lines.append(f"{code} {prefix}{len(lines)}, {', '.join(operands)};")
        return f"{prefix}{len(lines) - 1}"

    def multiply(a, b, dtype):
        sums = [f"{prefix}{len(lines) + i}" for i in range(4)]
        code = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
        groups = ", ".join("{" + ", ".join(group) + "}" for group in (sums, a, b, ["zero"] * 4))
        lines.extend([f"{code} {groups};", "", "", ""])
        return sums

    return lines, put, multiply


@gluon.constexpr_function
def product_by_16(values):
    """PTX, a line for each register p that it sets, and where the results are: the lowest two bits of the register's
    number and of the lane's, of which there are `lane` and `zero`, times H of 16 on tensor cores."""
    lines, put, multiply = writer("p")
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
            sums = multiply(a, (plus, (plus, minus)[half]), "bf16")
            for row in range(2):
                for pair in range(2):
                    results[start + 4 * row + 2 * half + pair] = sums[2 * row + pair]
    return lines, results


SMALLER = 256
"""What `two_products` divide by, so that fp16 has room for them."""


@gluon.constexpr_function
def two_products(values, block):
    """PTX, a line for each register w that it sets, and where the results of the 8 values are: bits 0 to 2 of the
    register's number and all five of the lane's, as bits 0 to 7 of the channel's, times H of 64 or 128, over `SMALLER`.

    Results are for the channels whose bits 0, 1 and 7 are the register's number, 5, 6, 2, 3 and 4 the lane's.
    """
    lines, put, multiply = writer("w")

    def bit(number, to):
        """This bit of the lane's number as bit `to`, and nothing else."""
        return put("shl.b32", put("and.b32", put("shr.b32", "lane", str(number)), "1"), str(to))

    def both(sign):
        """A sign in bit 15 for two numbers."""
        return put("xor.b32", sign, put("shl.b32", sign, "16"))

    # H of 16 as the left operand, for bits 0 and 2 to 4 of the channel's number: as rows they are the half and bits 2
    # to 4 of the lane's number, as columns the pair, the half and the lane's bits 0 and 1.
    common = put("and.b32", put("and.b32", put("shr.b32", "lane", "3"), "lane"), "3")
    odd = both(put("shl.b32", put("and.b32", put("popc.b32", common), "1"), "15"))
    first = put("xor.b32", odd, f"{(127 - log2(SMALLER) << 7) * 0x10001:#x}")  # 1 / SMALLER
    third = put("xor.b32", first, both(bit(2, 15)))
    left = [first, put("xor.b32", first, "0x80000000"), third, put("xor.b32", third, "0x80000000")]
    # The right operand, for bits 1 and 5 to 7, which were the lane's 2 to 4: as rows the half, the pair and the lane's
    # bits 0 and 1; as columns which of two products, and, in the order of 7, 5 and 6, the lane's bits 2 to 4. What is
    # beyond the block stays as it is.
    other = put("xor.b32", put("shr.b32", "lane", "1"), put("shr.b32", "lane", "2"))
    unlike = put("and.b32", other, "1")
    if block == 128:
        sign = both(put("shl.b32", put("and.b32", put("and.b32", put("shr.b32", "lane", "4"), "lane"), "1"), "15"))
    else:
        beyond = put("and.b32", put("xor.b32", put("shr.b32", "lane", "4"), "lane"), "1")
        unlike = put("or.b32", unlike, beyond)
        sign = "zero"
    one = put("xor.b32", put("xor.b32", sign, bit(3, 31)), "0x3c003c00")  # of fp16
    plus = put("and.b32", one, put("sub.s32", unlike, "1"))
    minus = put("xor.b32", plus, "0x80008000")

    right = [[put("cvt.rn.bf16x2.f32", values[i + 1], values[i]) for i in (q, q + 4)] for q in (0, 2)]
    products = [multiply(left, pair, "bf16") for pair in right]
    again = [put("cvt.rn.f16x2.f32", products[q][i + 1], products[q][i]) for q in range(2) for i in (0, 2)]
    results = list(values)
    for q in range(2):
        sums = multiply(again, (plus, (plus, minus)[q]), "f16")
        for half in range(2):
            for pair in range(2):
                results[half + 2 * q + 4 * pair] = sums[2 * half + pair]
    return lines, results


@gluon.constexpr_function
def crosswise(block):
    """PTX of `two_products` for the 8 channels of a thread."""
    lines, results = two_products([f"${8 + i}" for i in range(8)], block)
    head = f".reg .b32 lane, zero, w<{len(lines) + 1}>; mov.u32 lane, %laneid; mov.b32 zero, 0;"
    return " ".join(["{", head, *filter(None, lines), *(f"mov.b32 ${i}, {results[i]};" for i in range(8)), "}"])


@gluon.constexpr_function
def rotation(width, warps, block, held, regular, product):
    """PTX that multiplies the block of a thread and its neighbours by H; see `hadamard.SEEDS`.

    product: by tensor cores, where four bits lie as these need them
    """
    inside, rest = thread_bits(width, warps, block, held)
    # Where each bit of the channel number is: a bit of the register's number, or of the lane's.
    places = [(1 << inside.index(b), 0) if b in inside else (0, 1 << rest.index(b)) for b in range(log2(block))]
    lines, put, _ = writer("t")
    n = 1 << len(inside)

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


@gluon.constexpr_function
def unit_of(t):
    """What the results of `rotate` are to be multiplied by."""
    return (SMALLER if t.product > 1 else 1) * (t.block**-0.5 if t.block else 1.0)


@gluon.jit
def rotate(y, T: gl.constexpr):
    """y [R, WIDTH] times H (of +-1) in every block of channels."""
    WIDTH: gl.constexpr = y.shape[1]
    ASM: gl.constexpr = (
        crosswise(T.block) if T.product > 1 else rotation(WIDTH, T.warps, T.block, T.held, T.regular, T.product)
    )
    N: gl.constexpr = held_by_thread(WIDTH, T.warps, T.block, T.held)
    return gl.inline_asm_elementwise(ASM, floats(N), [y], dtype=gl.float32, is_pure=True, pack=N)


@gluon.jit
def in_order(tile, T: gl.constexpr):
    """The tile of what `two_products` has made of one, whose channels are counted where they were; nothing moves."""
    ROWS: gl.constexpr = tile.shape[0]
    WIDTH: gl.constexpr = tile.shape[1]
    if WIDTH >= 256:
        parts = gl.permute(gl.reshape(tile, [ROWS, WIDTH // 256, 8, 4, 2, 4]), (0, 1, 4, 3, 2, 5))
    else:  # half of a warp has one token: bit 7 of the channel's number is the lowest of the token's
        parts = gl.permute(gl.reshape(tile, [ROWS // 2, 2, 4, 4, 2, 4]), (0, 4, 3, 1, 2, 5))
    return gl.reshape(parts, [ROWS, WIDTH])
