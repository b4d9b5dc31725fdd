"""Sums and sums of squares of bfloat16 tokens on tensor cores, on NVIDIA GPUs.

Products of bfloat16 are exact in fp32, and a product of a matrix and its own transpose has the squares of its rows on
the diagonal. So three instructions add up four channels of every lane and their squares, in place of eight, and nothing
need be centred first. A variance from these loses digits where the mean is far larger than the deviation, about as many
as bfloat16 has lost there already.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def, assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_layout import held_by_thread, is_spread_alike, is_whole
from .gluon_sums import by_lane, by_thread


@gluon.constexpr_function
def moments_of(n):
    """PTX for n bfloat16 of each thread, which are results 2 n and on. Of four lanes, one gets the sum of all their
    channels as result 0 and that of the squares as result n, the others 0; all other results are 0."""
    # A product waits for the one that its sum is of: every other one of many is added to a second sum.
    chains = ("sab", "tcd") if n >= 32 else ("sab",)
    lines = [
        ".reg .b32 lane, quad, odd, zero, ones, sum, even, other; .reg .pred own, second;",
        f".reg .f32 {', '.join(f'{name}<4>' for chain in chains for name in chain)};",
        "mov.u32 lane, %laneid; mov.b32 zero, 0; mov.b32 ones, 0x3f803f80;",
        *(f"mov.f32 {name}{i}, 0f00000000;" for chain in chains for name in chain for i in range(4)),
    ]

    def multiply(name, shape, left, right):
        """name += left right; columns of the right one are the channels of four lanes each."""
        total = f"{{{name}0, {name}1, {name}2, {name}3}}"
        lines.append(
            f"mma.sync.aligned.{shape}.row.col.f32.bf16.bf16.f32 {total}, "
            f"{{{', '.join(left)}}}, {{{', '.join(right)}}}, {total};"
        )

    # Rows 0 to 7 of the first operand are the lanes' own channels in even registers, rows 8 to 15 those in odd ones. Of
    # its products with each, a diagonal is wanted.
    held = [f"${i}" for i in range(2 * n, 2 * n + n // 2)]
    for i in range(0, len(held), 2):
        pair = held[i : i + 2]
        chain = chains[i // 2 % len(chains)]
        multiply(chain[0], "m16n8k16", ["ones"] * 4, pair)
        multiply(chain[1], "m16n8k8", pair, pair[:1])
        multiply(chain[2], "m16n8k8", pair, pair[1:])
    for more, total in zip("".join(chains[1:]), "sab", strict=False):
        lines += [f"add.f32 {total}{i}, {total}{i}, {more}{i};" for i in ((2, 3) if total == "b" else (0, 1))]
    lines += [
        "shr.u32 quad, lane, 3; xor.b32 quad, quad, lane; and.b32 quad, quad, 3; setp.eq.u32 own, quad, 0;",
        "and.b32 odd, lane, 4; setp.ne.u32 second, odd, 0;",
        "selp.b32 sum, s1, s0, second; selp.b32 even, a1, a0, second; selp.b32 other, b3, b2, second;",
        "add.f32 even, even, other;",
        f"selp.b32 $0, sum, zero, own; selp.b32 ${n}, even, zero, own;",
        *(f"mov.b32 ${i}, zero;" for i in range(2 * n) if i % n),
    ]
    return " ".join(["{", *lines, "}"])


@gluon.constexpr_function
def operands(n):
    """Constraints of 2 n results in fp32 registers and n bfloat16, two to a register."""
    return ",".join(["=f"] * (2 * n) + ["r"] * (n // 2))


@gluon.jit
def first(a, b):
    return a


@gluon.jit
def both_sums(a, b, c, d):
    return a + c, b + d


OTHER_TOKEN = gl.constexpr(18)
"""Lanes that have a sum of `moments_of` for the one and for the other half of a warp differ in these bits."""


@gluon.jit
def first_of_threads(tile, N: gl.constexpr, T: gl.constexpr):
    """[R, WIDTH] -> [R, threads]: the sums over the first of every N channels that a thread holds."""
    if is_whole(tile.shape[1], T.warps):
        held = by_thread(tile, T)
        groups = gl.reshape(held, [held.shape[0], held.shape[1], held.shape[2] // N, N])
        part = gl.sum(gl.reduce(groups, 3, first), 2)
    else:
        part = by_lane(gl.reduce(gl.reshape(tile, [tile.shape[0], 16, N]), 2, first), OTHER_TOKEN, T)
    return part


@gluon.jit
def lane_moments(tile, ALIKE: gl.constexpr, T: gl.constexpr):
    """fp32 [R, threads], twice, where the tiles are spread ALIKE; else [R, WIDTH]."""
    # All channels of a token at once where a thread has them side by side in its registers.
    N: gl.constexpr = (
        tile.shape[1] // (32 * T.warps)
        if is_whole(tile.shape[1], T.warps)
        else held_by_thread(tile.shape[1], T.warps, T.block, T.held)
    )
    sums, squares = gl.inline_asm_elementwise(
        moments_of(N), operands(N), [tile], dtype=(gl.float32, gl.float32), is_pure=True, pack=N
    )
    if ALIKE:
        sums, squares = first_of_threads(sums, N, T), first_of_threads(squares, N, T)
    return sums, squares


@gluon.jit
def token_moments(tiles, T: gl.constexpr):
    """fp32 [R], twice: the sums over all tiles of bfloat16, and those of the squares."""
    ALIKE: gl.constexpr = is_spread_alike(T)
    sums, squares = lane_moments(tiles[0], ALIKE, T)
    if ALIKE:
        for i in gl.static_range(1, len(tiles)):
            more, more_squares = lane_moments(tiles[i], ALIKE, T)
            sums += gl.convert_layout(more, sums.type.layout, assert_trivial=True)
            squares += gl.convert_layout(more_squares, squares.type.layout, assert_trivial=True)
        sums, squares = gl.reduce((sums, squares), 1, both_sums)
    else:
        sums, squares = gl.reduce((sums, squares), 1, both_sums)
        for i in gl.static_range(1, len(tiles)):
            more, more_squares = lane_moments(tiles[i], ALIKE, T)
            more, more_squares = gl.reduce((more, more_squares), 1, both_sums)
            sums += gl.convert_layout(more, sums.type.layout)
            squares += gl.convert_layout(more_squares, squares.type.layout)
    return sums, squares
