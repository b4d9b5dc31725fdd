"""Vectors over the channels for the fused producers of NVIDIA GPUs: from memory to a tile's layout.

What a token is multiplied with is needed last but should be asked for first: memory takes as long to answer as all the
arithmetic. It does not fit the registers beside the token, so it waits in shared memory (STAGED), where all teams of a
program find it. A vector that is not there is an empty tuple.
"""

# Kernel parameters are typed by what is launched, not by annotations; tuples grow in loops that the compiler unrolls,
# and it knows no starred expression.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .gluon_layout import layout
from .gluon_rows import load_rows, plus_product, widen


@gluon.jit
def copy_piece(ptr, FROM: gl.constexpr, WIDTH: gl.constexpr, END: gl.constexpr):
    """Start to copy channels into a buffer of shared memory; what is in it for those from END on is not said."""
    BYTES: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    buffer = gl.allocate_shared_memory(ptr.dtype.element_ty, [WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k = FROM + gl.arange(0, WIDTH, layout=gl.BlockedLayout([16 // BYTES], [32], [gl.num_warps()], [0]))
    if FROM + WIDTH > END:
        async_copy.async_copy_global_to_shared(buffer, ptr + k, mask=k < END)
    else:
        async_copy.async_copy_global_to_shared(buffer, ptr + k)
    return buffer


@gluon.jit
def stage(ptr, T: gl.constexpr, STAGED: gl.constexpr):
    """Start to copy a vector: a buffer for each of the tiles, or none at all."""
    buffers = ()
    if STAGED and ptr is not None:
        for i in gl.static_range(len(T.pieces)):
            buffers = buffers + (copy_piece(ptr, T.pieces[i][0], T.pieces[i][1], T.pieces[i][2]),)
    return buffers


@gluon.jit
def end_of_copies(STAGED: gl.constexpr):
    """Behind the last `stage`."""
    if STAGED:
        async_copy.commit_group()


@gluon.jit
def await_copies(STAGED: gl.constexpr):
    """From here on, all that was staged can be read."""
    if STAGED:
        async_copy.wait_group(0)


@gluon.jit
def load_vector(ptr, FROM: gl.constexpr, END: gl.constexpr, LAYOUT: gl.constexpr):
    """[1, WIDTH] of a vector over the channels, as stored; 0 from END on."""
    WIDTH: gl.constexpr = LAYOUT.shape[1]
    k = FROM + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    if FROM + WIDTH > END:
        vector = gl.load(ptr + k, mask=k < END, other=0)
    else:
        vector = gl.load(ptr + k)
    return gl.expand_dims(vector, 0)


@gluon.jit
def read_piece(buffer, FROM: gl.constexpr, END: gl.constexpr, LAYOUT: gl.constexpr):
    """As `load_vector`, of what `copy_piece` has copied."""
    WIDTH: gl.constexpr = LAYOUT.shape[1]
    vector = buffer.load(gl.SliceLayout(0, LAYOUT))
    if FROM + WIDTH > END:
        k = FROM + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
        vector = gl.where(k < END, vector, gl.full([WIDTH], 0, vector.dtype, gl.SliceLayout(0, LAYOUT)))
    return gl.expand_dims(vector, 0)


@gluon.jit
def vector_of(ptr, buffers, i: gl.constexpr, T: gl.constexpr):
    """([1, WIDTH],) for tile i, as stored: staged, or loaded now."""
    found = ()
    if len(buffers) > 0:
        found = (read_piece(buffers[i], T.pieces[i][0], T.pieces[i][2], layout(T, i)),)
    elif ptr is not None:
        found = (load_vector(ptr, T.pieces[i][0], T.pieces[i][2], layout(T, i)),)
    return found


@gluon.jit
def stage_row(ptr, stride, sample, T: gl.constexpr, STAGED: gl.constexpr):
    """`stage` of row `sample`."""
    buffers = ()
    if ptr is not None:
        buffers = stage(ptr + sample.to(gl.int64) * stride, T, STAGED)
    return buffers


@gluon.jit
def shared_row(ptr, buffers, stride, sample, row, TOKENS, i: gl.constexpr, T: gl.constexpr, ONE: gl.constexpr):
    """`vector_of` of row `sample` where all tokens share ONE, else ([R, WIDTH],) of the rows that TOKENS share."""
    found = ()
    if ptr is not None:
        if ONE:
            found = vector_of(ptr + sample.to(gl.int64) * stride, buffers, i, T)
        else:
            at = (row // TOKENS).to(gl.int64)
            found = (load_rows(ptr, at, stride, T.pieces[i][0], T.pieces[i][2], layout(T, i)),)
    return found


@gluon.jit
def factor_of(pre_scale, signs, LAYOUT: gl.constexpr):
    """fp32 [1, WIDTH]: pre_scale * signs."""
    WIDTH: gl.constexpr = LAYOUT.shape[1]
    if len(pre_scale) > 0:
        factor = widen(pre_scale[0])
    else:
        factor = gl.expand_dims(gl.full([WIDTH], 1.0, gl.float32, gl.SliceLayout(0, LAYOUT)), 0)
    if len(signs) > 0:
        # One word has the signs of four channels.
        factor = gl.inline_asm_elementwise(
            """{ .reg .b32 s0, s1, s2;
            shl.b32 s0, $4, 24; shl.b32 s1, $4, 16; shl.b32 s2, $4, 8;
            lop3.b32 $0, $5, s0, 0x80000000, 0x78; lop3.b32 $1, $6, s1, 0x80000000, 0x78;
            lop3.b32 $2, $7, s2, 0x80000000, 0x78; lop3.b32 $3, $8, $4, 0x80000000, 0x78; }""",
            "=f,=f,=f,=f,r,f,f,f,f", [signs[0], factor], dtype=gl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    return factor


@gluon.jit
def slope_and_offset(factor, weight, bias, shift, scale):
    """((xhat * weight + bias) * (1 + scale) + shift) * factor as (slope, offset) of xhat, or (slope,)."""
    slope = factor
    if len(scale) > 0:
        slope = plus_product(factor, factor, widen(scale[0]))
    if len(bias) > 0:
        offset = widen(bias[0]) * slope
        if len(shift) > 0:
            offset = plus_product(offset, widen(shift[0]), factor)
    elif len(shift) > 0:
        offset = widen(shift[0]) * factor
    if len(weight) > 0:
        slope = slope * widen(weight[0])
    if len(bias) > 0 or len(shift) > 0:
        found = (slope, offset)
    else:
        found = (slope,)
    return found
