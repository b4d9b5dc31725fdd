"""Sums and maxima over a token's channels, on NVIDIA GPUs: see `gluon_layout` for where these are."""

# Kernel parameters are typed by what is launched, not by annotations; tuples grow in loops that the compiler unrolls,
# and it knows no starred expression.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_layout import is_spread_alike, is_whole, split_shape
from .gluon_rotation import in_order


@gluon.jit
def max_or_nan(a, b):
    """The larger one, nan if either is."""
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def by_thread(tile, T: gl.constexpr):
    """[R, WIDTH] -> [R, threads of a team, channels of a thread]; nothing moves."""
    SHAPE: gl.constexpr = split_shape(tile.shape[0], tile.shape[1], T.warps, T.block, T.held)
    parts = gl.permute(gl.reshape(tile, SHAPE), (0, 2, 4, 1, 3, 5))
    THREADS: gl.constexpr = 32 * T.warps
    return gl.reshape(parts, [tile.shape[0], THREADS, tile.shape[1] // THREADS])


@gluon.jit
def combine(a, b, MAXIMUM: gl.constexpr):
    if MAXIMUM:
        both = max_or_nan(a, b)
    else:
        both = a + b
    return both


@gluon.jit
def combine_along(tile, axis: gl.constexpr, MAXIMUM: gl.constexpr):
    if MAXIMUM:
        both = gl.reduce(tile, axis, max_or_nan)
    else:
        both = gl.sum(tile, axis)
    return both


@gluon.constexpr_function
def halves(step):
    """PTX: a number of the lane's own token -> those for both tokens, 0 where the lane has none.

    The second token's come from the lanes that differ in the bits of `step`, so that a sum does not depend on which of
    the two a token is; for a step of 0 they stay.
    """
    lines = [
        ".reg .b32 lane, moved; .reg .pred second; mov.u32 lane, %laneid; setp.gt.u32 second, lane, 15;",
        f"shfl.sync.bfly.b32 moved, $2, {step}, 0x1f, 0xffffffff;" if step else "",
        "selp.b32 $0, 0, $2, second;",
        "selp.b32 $1, 0, moved, second;" if step else "selp.b32 $1, $2, 0, second;",
    ]
    return " ".join(["{", *lines, "}"])


@gluon.jit
def by_lane(part, STEP: gl.constexpr, T: gl.constexpr):
    """[rows, 16 lanes] of a halved tile -> [tokens, 32 lanes]; see `halves`."""
    ASM: gl.constexpr = halves(STEP)
    one, other = gl.inline_asm_elementwise(
        ASM, "=f,=f,f", [part], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )  # fmt: skip
    lanes = gl.reshape(one, [T.teams, 32])
    if not T.few:  # else both are of the same token
        both = gl.join(lanes, gl.reshape(other, [T.teams, 32]))
        lanes = gl.reshape(gl.permute(both, (0, 2, 1)), [2 * T.teams, 32])
    return lanes


@gluon.jit
def of_threads(tile, MAXIMUM: gl.constexpr, T: gl.constexpr):
    """fp32 [R, threads of a team]: what each thread's own channels come to."""
    if is_whole(tile.shape[1], T.warps):
        part = combine_along(by_thread(tile, T), 2, MAXIMUM)
    else:
        part = by_lane(combine_along(gl.reshape(tile, [tile.shape[0], 16, 8]), 2, MAXIMUM), 0 if MAXIMUM else 16, T)
    return part


@gluon.jit
def largest_of_threads(tile, T: gl.constexpr):
    """As `of_threads`, the maximum of magnitudes that may have been rotated twice."""
    if T.product > 1 and not is_whole(tile.shape[1], T.warps):
        # every lane holds both tokens by now: see `in_order`
        parts = gl.permute(gl.reshape(in_order(tile, T), [tile.shape[0], 4, 8, 4]), (0, 2, 1, 3))
        part = combine_along(gl.reshape(parts, [tile.shape[0], 32, 4]), 2, True)
        if T.few:  # twice the same
            part = combine_along(gl.reshape(part, [tile.shape[0] // 2, 2, 32]), 1, True)
    else:
        part = of_threads(tile, True, T)
    return part


@gluon.jit
def over_threads(part, MAXIMUM: gl.constexpr):
    """[R, threads] -> [R]. Magnitudes are ordered as their bits are, nan being the largest, and integers have an
    instruction for it."""
    if MAXIMUM:
        total = gl.max(part.to(gl.int32, bitcast=True), 1).to(gl.float32, bitcast=True)
    else:
        total = gl.sum(part, 1)
    return total


@gluon.jit
def per_token(tiles, MAXIMUM: gl.constexpr, T: gl.constexpr):
    """fp32 [R]: sums or maxima, of numbers not below 0, over all tiles; at once where that can be, because warps wait
    for each other. Maxima are of what is rotated."""
    if is_spread_alike(T):
        part = largest_of_threads(tiles[0], T) if MAXIMUM else of_threads(tiles[0], False, T)
        for i in gl.static_range(1, len(tiles)):
            other = largest_of_threads(tiles[i], T) if MAXIMUM else of_threads(tiles[i], False, T)
            part = combine(part, gl.convert_layout(other, part.type.layout, assert_trivial=True), MAXIMUM)
        total = over_threads(part, MAXIMUM)
    else:
        total = combine_along(tiles[0], 1, MAXIMUM)
        for i in gl.static_range(1, len(tiles)):
            other = gl.convert_layout(combine_along(tiles[i], 1, MAXIMUM), total.type.layout)
            total = combine(total, other, MAXIMUM)
    return total


@gluon.jit
def products(tiles, others):
    """tiles[i] * others[i]."""
    found = ()
    for i in gl.static_range(len(tiles)):
        found = found + (tiles[i] * others[i],)
    return found


@gluon.jit
def magnitudes(tiles):
    found = ()
    for i in gl.static_range(len(tiles)):
        found = found + (gl.abs(tiles[i]),)
    return found
