"""Where the fused producers for NVIDIA GPUs keep the channels of a token: which thread, which register.

The tokens of a program are a few tiles [ROWS, WIDTH] (`pieces`) whose layout says which thread holds which channel
(`layout_of`): 8 side by side, so that memory is accessed 16 bytes at a time, and lanes next to each other hold the rest
of a Hadamard block. Tokens are shared by the warps of a team. Several teams of a program do the same, each with tokens
of its own, and read vectors over the channels once for all: how many there are changes no result.
"""

# Run by the compiler, on constants.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

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
def layout_of(rows, width, warps, block, held, teams=1):
    """Layout of a tile [rows * teams, width]: the lanes and warps of a team are spread over the channels first, then
    over its tokens."""
    inside, rest = thread_bits(width, warps, block, held)
    threads = 5 + log2(warps)
    order = [[0, 1 << bit] for bit in rest] + [[1 << bit, 0] for bit in range(log2(rows))]
    spread = (order + [[0, 0]] * threads)[:threads]
    spread += [[rows << bit, 0] for bit in range(log2(teams))]
    registers = [[0, 1 << bit] for bit in inside] + order[threads:]
    return gl.DistributedLinearLayout(registers, spread[:5], spread[5:], [], [rows * teams, width])


@gluon.constexpr_function
def pieces(k, prefix, rows, warps, block):
    """((from, width, end), ...): what covers the channels 0 to `prefix` and those to k; channels from `end` on are 0.

    Widths are powers of two that keep every thread busy, as long as teams have all their tokens.
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
def is_whole(width, warps):
    """Whether every thread of a team holds channels of all its tokens in a tile of this width."""
    return width >= 32 * LANE * warps


@gluon.constexpr_function
def is_halved(t, i):
    """Whether half of a warp holds one token of tile i, the other half another, and that is all."""
    return t.warps == 1 and 2 * t.pieces[i][1] == 32 * LANE and t.rows * (1 + t.few) == 2


@gluon.constexpr_function
def is_doubled(t, i):
    """Whether tile i has two rows for every token, the same twice."""
    return t.few and is_halved(t, i)


@gluon.constexpr_function
def is_spread_alike(t):
    """Whether the tiles of a `Tiling` can be added thread by thread."""
    return all(is_whole(width, t.warps) or is_halved(t, i) for i, (_, width, _) in enumerate(t.pieces))


@gluon.constexpr_function
def split_shape(rows, width, warps, block, held):
    """Dimensions of a tile's bits: token, highest registers, threads, registers, lanes, registers."""
    inside, _ = thread_bits(width, warps, block, held)
    more, lanes = 1 << (len(inside) - 3), 1 << (max(log2(block), 3) - len(inside))
    return [rows, width // (32 * warps * more * 8), 32 * warps // lanes, more, lanes, 8]


@dataclass(frozen=True)
class Tiling:
    """What a program does with its tokens.

    pieces: its tiles, as `pieces` has them
    rows: tokens of a team, half as many where they are `few`; warps: of a team; teams: of a program
    block, regular: size of a Hadamard block, or 0, and whether its matrix is regular
    held: most channels of a block in one thread
    product: 0, or 1 where tensor cores rotate, 2 where they do it crosswise (`gluon_rotation`)
    """

    pieces: tuple[tuple[int, int, int], ...]
    rows: int
    few: bool
    warps: int
    teams: int
    block: int
    regular: bool
    held: int
    product: int


@gluon.constexpr_function
def tiling(covered, team, rotation):
    """The `Tiling` of tokens that tiles (`pieces`) cover.

    team: tokens and warps of one, whether half of the tokens are left out, and teams of a program. What is left out
    when tokens are few makes more warps share the work; the others' channels are where they would be with all, and so
    are their sums the same.
    rotation: block, regular, held and product
    """
    rows, warps, few, teams = team
    block, regular, held, product = rotation
    rows = rows // 2 if few else rows
    return Tiling(covered, rows, few, warps, teams, block, regular, held, product)


@gluon.constexpr_function
def tokens_of(t):
    """Tokens of a program."""
    return t.rows * t.teams


@gluon.constexpr_function
def rows_of(t, i):
    """Rows of tile i of a `Tiling`."""
    return tokens_of(t) * (2 if is_doubled(t, i) else 1)


@gluon.constexpr_function
def layout(t, i):
    """That of tile i of a `Tiling`."""
    return layout_of(rows_of(t, i) // t.teams, t.pieces[i][1], t.warps, t.block, t.held, t.teams)
