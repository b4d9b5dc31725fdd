"""Where the fused producers for NVIDIA GPUs keep the channels of a token: which thread, which register.

R tokens are a few tiles [R, WIDTH] (`pieces`) whose layout says which thread holds which channel (`layout_of`): 8 side
by side, so that memory is accessed 16 bytes at a time, and lanes next to each other hold the rest of a Hadamard block.
"""

# Run by the compiler, on constants.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LANE = 8
"""Channels that a thread holds side by side."""


@gluon.constexpr_function
def log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def thread_bits(width, warps, block, held):
    """Bits of the channel number of a tile: those that choose a register, and the rest from the lowest up.

    held: channels of one Hadamard block in one thread, at least 8; less where threads would have nothing left.
    """
    bits, size = log2(width), max(log2(block), 3)
    spare = bits - 3 - (5 + log2(warps))
    more = max(0, min(log2(held) - 3, size - 3, spare))
    inside = [0, 1, 2, *range(size - more, size)]
    return inside, [bit for bit in range(bits) if bit not in inside]


@gluon.constexpr_function
def layout_of(rows, width, warps, block, held):
    """Layout of a tile [rows, width]: lanes and warps are spread over the channels first, then over the tokens."""
    inside, rest = thread_bits(width, warps, block, held)
    threads = 5 + log2(warps)
    order = [[0, 1 << bit] for bit in rest] + [[1 << bit, 0] for bit in range(log2(rows))]
    spread = (order + [[0, 0]] * threads)[:threads]
    registers = [[0, 1 << bit] for bit in inside] + order[threads:]
    return gl.DistributedLinearLayout(registers, spread[:5], spread[5:], [], [rows, width])


@gluon.constexpr_function
def pieces(k, prefix, rows, warps, block):
    """((from, width, end), ...): what covers the channels 0 to `prefix` and those to k; channels from `end` on are 0.

    Widths are powers of two that keep every thread busy.
    """
    found, unit = [], max(block, 16, 32 * LANE * warps // rows)
    for start, end in ((0, prefix), (prefix, k)):
        left = -(-(end - start) // unit) * unit
        while left > 0:
            width = 1 << log2(left)
            found.append((start, width, end))
            start, left = start + width, left - width
    return tuple(found)


@gluon.constexpr_function
def held_by_thread(width, warps, block, held):
    return 1 << len(thread_bits(width, warps, block, held)[0])


@gluon.constexpr_function
def is_spread_alike(sizes, warps):
    """Whether every thread holds all tokens of every tile, so that the tiles can be added thread by thread."""
    return all(width >= 32 * LANE * warps for _, width, _ in sizes)


@gluon.constexpr_function
def split_shape(rows, width, warps, block, held):
    """Dimensions of a tile's bits: token, highest registers, threads, registers, lanes, registers."""
    inside, _ = thread_bits(width, warps, block, held)
    more, lanes = 1 << (len(inside) - 3), 1 << (max(log2(block), 3) - len(inside))
    return [rows, width // (32 * warps * more * 8), 32 * warps // lanes, more, lanes, 8]
