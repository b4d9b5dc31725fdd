"""Pieces of the fused producers for NVIDIA GPUs: whole tokens in registers, from memory to codes.

A token's channels lie where `gluon_layout` says, so that its rotation needs no shared memory (`gluon_rotation`).
"""

# Kernel parameters are typed by what is launched, not by annotations; tuples grow in loops that the compiler unrolls,
# and it knows no starred expression.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

from .gluon_fp4 import fp4_codes
from .gluon_layout import layout, rows_of, tokens_of
from .gluon_rotation import in_order, rotate, unit_of
from .gluon_sums import magnitudes, max_or_nan, per_token
from .tiles import limit_of


@gluon.jit
def wait_for_inputs():
    """Wait for the kernels launched before: nothing is read before that."""
    if cuda_capability_geq(9, 0):
        gdc_wait()


@gluon.jit
def start_next():
    """Let the next kernel start. The compiler moves no load from before this to behind it."""
    if cuda_capability_geq(9, 0):
        gdc_launch_dependents()


@gluon.jit
def await_inputs():
    """As in `tiles`."""
    wait_for_inputs()
    start_next()


@gluon.jit
def program_again():
    """The program's first number, read anew: what was made of it before need not wait in a register."""
    # whatever the argument: an instruction of this kind has one
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %ctaid.x;", "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def widen(t):
    """fp32 of floats; bfloat16 in one instruction each."""
    if t.dtype == gl.bfloat16:
        wide = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [t], dtype=gl.float32, is_pure=True, pack=2
        )
    else:
        wide = t.to(gl.float32)
    return wide


@gluon.jit
def plus_product(a, b, c):
    """a + b * c rounded once, always: which of two products the compiler would fuse is up to the code around."""
    b, c = gl.broadcast(b, c)
    a, b = gl.broadcast(a, b)
    a, c = gl.broadcast(a, c)
    return gl.fma(b, c, a)


@gluon.jit
def narrow(t, dtype: gl.constexpr):
    """t rounded to `dtype`; bfloat16 in half an instruction each."""
    if dtype == gl.bfloat16:
        t = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [t], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        t = t.to(dtype)
    return t


@gluon.jit
def load_rows(ptr, row, stride, FROM: gl.constexpr, END: gl.constexpr, LAYOUT: gl.constexpr):
    """Tile of rows `row` [R] (int64), as stored; channels from END on are 0."""
    WIDTH: gl.constexpr = LAYOUT.shape[1]
    k = gl.expand_dims(FROM + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT)), 0)
    at = ptr + gl.expand_dims(row * stride, 1) + k
    if FROM + WIDTH > END:
        tile = gl.load(at, mask=k < END, other=0.0)
    else:
        tile = gl.load(at)
    return tile


@gluon.jit
def spread(values, tile):
    """[R] -> [R, 1] in the layout of a tile; [2 R, WIDTH] where that has every token twice."""
    if tile.shape[0] == values.shape[0]:
        found = gl.expand_dims(gl.convert_layout(values, gl.SliceLayout(1, tile.type.layout)), 1)
    else:
        twice = gl.reshape(tile, [values.shape[0], 2, tile.shape[1]])
        one = gl.convert_layout(values, gl.SliceLayout(1, gl.SliceLayout(2, twice.type.layout)))
        found, twice = gl.broadcast(gl.expand_dims(gl.expand_dims(one, 1), 2), twice)
        found = gl.convert_layout(gl.reshape(found, tile.shape), tile.type.layout, assert_trivial=True)
    return found


@gluon.jit
def low_bytes(t):
    """int8: the lowest bytes of fp32 numbers; behind a sum with 1.5 * 2**23 they are the integers."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 low, high;
        prmt.b32 low, $1, $2, 0x0040; prmt.b32 high, $3, $4, 0x0040; prmt.b32 $0, low, high, 0x5410; }""",
        "=r,f,f,f,f", [t], dtype=gl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def divided(a, b, inverse):
    """a / b to the nearest number, given about 1 / b; nothing here needs denormals or overflows, as a division may."""
    near = a * inverse
    return gl.fma(gl.fma(-near, b, a), inverse, near)


@gluon.jit
def reciprocal(t):
    """1 / t to a unit in the last place, in one instruction; t is no denormal."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def encode(z, inverse, INT8: gl.constexpr):
    """Codes of z * inverse: int8, rounding half to even by adding 1.5 * 2**23, or float8_e4m3fn."""
    if INT8:
        codes = low_bytes(z * inverse + 12582912.0)
    else:
        t = gl.maximum(z * inverse, -448.0, propagate_nan=tl.PropagateNan.ALL)
        codes = gl.minimum(t, 448.0, propagate_nan=tl.PropagateNan.ALL).to(gl.float8e4nv)
    return codes


@gluon.jit
def numbers(ROWS: gl.constexpr, LAYOUT: gl.constexpr, T: gl.constexpr):
    """int32: which of the program's tokens the rows of a tile of this layout are."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    if tokens_of(T) < ROWS:  # each twice
        row = row // 2
    return row


@gluon.jit
def tokens(first, M, i: gl.constexpr, T: gl.constexpr):
    """int32: the tokens of tile i from `first` on. Beyond the edge the last one repeats: nothing of it is stored."""
    return gl.minimum(first + numbers(rows_of(T, i), layout(T, i), T), M - 1)


@gluon.jit
def store_rows(ptr, tile, first, M, i: gl.constexpr, T: gl.constexpr, K: gl.constexpr):
    """Store tile i into dense rows of K channels."""
    FROM: gl.constexpr = T.pieces[i][0]
    END: gl.constexpr = T.pieces[i][2]
    LAYOUT: gl.constexpr = tile.type.layout
    row = first + numbers(tile.shape[0], LAYOUT, T)
    k = gl.expand_dims(FROM + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, LAYOUT)), 0)
    mask = gl.expand_dims(row < M, 1)
    if FROM + tile.shape[1] > END:
        mask = mask & (k < END)
    gl.store(ptr + gl.expand_dims(row.to(gl.int64) * K, 1) + k, tile, mask=mask)


@gluon.jit
def store_fp4(tiles, inverse, codes_ptr, first, M, T: gl.constexpr, FP4: gl.constexpr, K: gl.constexpr):
    """Store the codes of t = tiles * inverse; returns the gain |t|^2 / <t, codes> of every token, fp32 [R]."""
    squares = ()
    along = ()
    for i in gl.static_range(len(tiles)):
        t = tiles[i] * spread(inverse, tiles[i])
        codes, raised = fp4_codes(t, FP4)
        store_rows(codes_ptr, low_bytes(raised), first, M, i, T, K)
        squares = squares + (t * t,)
        along = along + (t * codes,)
    total = per_token(along, False, T)
    return gl.where(total > 0, per_token(squares, False, T) / total, 1.0)


@gluon.jit
def all_in_order(tiles, T: gl.constexpr):
    found = ()
    for i in gl.static_range(len(tiles)):
        found = found + (in_order(tiles[i], T),)
    return found


@gluon.jit
def quantize_tokens(
    tiles, codes_ptr, scale_ptr, first, M, T: gl.constexpr, GAIN: gl.constexpr, INT8: gl.constexpr, FP4: gl.constexpr,
    TINY: gl.constexpr, K: gl.constexpr,
):  # fmt: skip
    """Rotate (T.block > 0), find one scale per token, round and store all tiles times GAIN, a power of two. H's
    1 / sqrt(T.block) is in the scale.

    FP4: None, or the group of `quant_token_fp4`.
    """
    LIMIT: gl.constexpr = limit_of(INT8, FP4)
    UNIT: gl.constexpr = GAIN * unit_of(T)
    if T.block > 0:
        rotated = ()
        for i in gl.static_range(len(tiles)):
            rotated = rotated + (rotate(tiles[i], T),)
    else:
        rotated = tiles
    top = per_token(magnitudes(rotated), True, T)
    if T.product > 1:
        rotated = all_in_order(rotated, T)
    amax = max_or_nan(top * UNIT, gl.full(top.shape, TINY, gl.float32, top.type.layout))
    row = first + gl.arange(0, top.shape[0], layout=top.type.layout)
    limit = gl.full(amax.shape, LIMIT, gl.float32, amax.type.layout)
    scale = divided(amax, limit, gl.full(amax.shape, 1.0 / LIMIT, gl.float32, amax.type.layout))
    inverse = divided(limit, amax, reciprocal(amax)) * UNIT
    if FP4 is not None:
        gain = store_fp4(rotated, inverse, codes_ptr, first, M, T, FP4, K)
        scale = scale * gl.convert_layout(gain, scale.type.layout)
    gl.store(scale_ptr + row, scale, mask=row < M)
    if FP4 is None:
        for i in gl.static_range(len(tiles)):
            codes = encode(rotated[i], spread(inverse, rotated[i]), INT8)
            store_rows(codes_ptr, codes, first, M, i, T, K)
