"""Low-rank branches in the products of `int8_hopper`: the loads of their ranks, and the sums that they continue.

A row of BK codes in a buffer is one of BK / 2 ranks of 16 bits.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma


@gluon.jit
def as_ranks(buffer, like, left: gl.constexpr = 64):
    """A buffer of int8 [ROWS, BK] as [ROWS, BK / 2] of a descriptor's 16-bit type, or the half that holds all that are
    left."""
    RANKS: gl.constexpr = buffer.shape[1] // 2
    ranks = buffer._reinterpret(like.dtype, [buffer.shape[0], RANKS], like.layout)
    if RANKS == 64 and left <= 32:
        ranks = ranks.slice(0, 32, dim=1)
    return ranks


@gluon.jit
def load_ranks(
    low_desc, up_desc, a_bufs, b_bufs, b1_bufs, bar, slot, row, col, first, r,
    NC: gl.constexpr, CM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Ranks r and on: low's columns are those of a layer from `first` on. Beyond a layer's ranks up's are 0, so that
    low's, of the next layer, do not count."""
    WIDTH: gl.constexpr = 128 if BN > 128 else BN
    BOX: gl.constexpr = BN - 128 if BN > 128 else BN
    for c in gl.static_range(NC):
        part = as_ranks(a_bufs.index(slot * NC + c), low_desc)
        tma.async_copy_global_to_shared(low_desc, [row + c * CM, first + r], bar, part)
    b = as_ranks(b_bufs.index(slot), up_desc)
    for c in gl.static_range(WIDTH // BOX):
        part = b if WIDTH == BOX else b.slice(c * BOX, BOX, dim=0)
        tma.async_copy_global_to_shared(up_desc, [col + c * BOX, r], bar, part)
    if BN > WIDTH:
        part = as_ranks(b1_bufs.index(slot), up_desc)
        tma.async_copy_global_to_shared(up_desc, [col + WIDTH, r], bar, part)


@gluon.jit
def vector(pointer, columns, N, EVEN_N: gl.constexpr):
    """Values of some columns in fp32."""
    if EVEN_N:
        return gl.load(pointer + columns).to(gl.float32)
    return gl.load(pointer + columns, mask=columns < N, other=0.0).to(gl.float32)


@gluon.jit
def scaled_sums(acc, s, weight_scale_ptr, col, N, EVEN_N: gl.constexpr):
    """fp32 sums * scale[m] * weight_scale[n], as a 16-bit product accumulates them."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, acc.shape[1], 16])
    columns = col + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    y = gl.convert_layout(acc, LAYOUT, assert_trivial=True).to(gl.float32)
    y = y * gl.expand_dims(gl.convert_layout(s, gl.SliceLayout(1, LAYOUT), assert_trivial=True), 1)
    return y * gl.expand_dims(vector(weight_scale_ptr, columns, N, EVEN_N), 0)
