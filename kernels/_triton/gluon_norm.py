"""The kernel of `norm_quant` and `gate_norm_quant` for NVIDIA GPUs, in Gluon: see `gluon_rows`."""

# Kernel parameters are typed by what is launched, not by annotations; tuples grow in loops that the compiler unrolls,
# and it knows no starred expression.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_layout import layout, pieces, tiling, tokens_of
from .gluon_moments import token_moments
from .gluon_rows import (
    load_rows,
    narrow,
    plus_product,
    program_again,
    quantize_tokens,
    spread,
    start_next,
    store_rows,
    tokens,
    wait_for_inputs,
    widen,
)
from .gluon_sums import per_token, products
from .gluon_vectors import (
    await_copies,
    end_of_copies,
    factor_of,
    shared_row,
    slope_and_offset,
    stage,
    stage_row,
    vector_of,
)


@gluon.jit
def gated_tile(
    x_ptr, branch_ptr, gate_ptr, h_ptr, x_stride, branch_stride, gate_stride, sample, first, M, TOKENS,
    i: gl.constexpr, T: gl.constexpr, K: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """x, or x + gate * branch, stored in h's type; as stored."""
    LAYOUT: gl.constexpr = layout(T, i)
    FROM: gl.constexpr = T.pieces[i][0]
    END: gl.constexpr = T.pieces[i][2]
    row = tokens(first, M, i, T)
    h = load_rows(x_ptr, row.to(gl.int64), x_stride, FROM, END, LAYOUT)
    if branch_ptr is not None:
        tile = widen(h)
        branch = widen(load_rows(branch_ptr, row.to(gl.int64), branch_stride, FROM, END, LAYOUT))
        gate = shared_row(gate_ptr, (), gate_stride, sample, row, TOKENS, i, T, ONE)
        if len(gate) > 0:
            tile = plus_product(tile, branch, widen(gate[0]))
        else:
            tile = tile + branch
        h = narrow(tile, h_ptr.dtype.element_ty)
        store_rows(h_ptr, h, first, M, i, T, K)
    return h


@gluon.jit
def real(tile, FROM: gl.constexpr, END: gl.constexpr):
    """The tile with 0 in the channels that do not exist."""
    if FROM + tile.shape[1] > END:
        k = FROM + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, tile.type.layout))
        tile = gl.where(gl.expand_dims(k < END, 0), tile, 0.0)
    return tile


@gluon.jit
def normed_by_moments(stored, eps, LAYER: gl.constexpr, K: gl.constexpr, T: gl.constexpr):
    """`normed` of bfloat16 by tensor cores: fewer instructions, but they wait longer."""
    sums, squares = token_moments(stored, T)
    mean = sums / K
    variance = squares / K
    if LAYER:
        variance = gl.maximum(variance - mean * mean, 0.0)
    factor = gl.rsqrt(variance + eps)
    offset = -mean * factor
    tiles = ()
    for i in gl.static_range(len(stored)):
        tile = widen(stored[i])
        if LAYER:
            tile = plus_product(spread(offset, tile), tile, spread(factor, tile))
            tile = real(tile, T.pieces[i][0], T.pieces[i][2])
        else:
            tile = tile * spread(factor, tile)
        tiles = tiles + (tile,)
    return tiles


@gluon.jit
def normed(stored, eps, LAYER: gl.constexpr, K: gl.constexpr, T: gl.constexpr):
    """fp32 tiles: LayerNorm or RMSNorm of the tokens whose tiles these are."""
    tiles = ()
    for i in gl.static_range(len(stored)):
        tiles = tiles + (widen(stored[i]),)
    if LAYER:
        mean = per_token(tiles, False, T) / K
        centred = ()
        for i in gl.static_range(len(tiles)):
            tile = real(tiles[i] - spread(mean, tiles[i]), T.pieces[i][0], T.pieces[i][2])
            centred = centred + (tile,)
        tiles = centred
    factor = gl.rsqrt(per_token(products(tiles, tiles), False, T) / K + eps)
    scaled = ()
    for i in gl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * spread(factor, tiles[i]),)
    return scaled


@gluon.jit
def changed_tile(
    tile, vectors, buffers, shift_ptr, mod_scale_ptr, shift_stride, mod_scale_stride, sample, row, TOKENS,
    i: gl.constexpr, T: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """Tile i of normed tokens, as the codes are made of it. vectors: pointers to pre_scale, signs, weight and bias;
    buffers: what is staged of these, of the shift and of the scale."""
    factor = factor_of(vector_of(vectors[0], buffers[0], i, T), vector_of(vectors[1], buffers[1], i, T), layout(T, i))
    line = slope_and_offset(
        factor, vector_of(vectors[2], buffers[2], i, T), vector_of(vectors[3], buffers[3], i, T),
        shared_row(shift_ptr, buffers[4], shift_stride, sample, row, TOKENS, i, T, ONE),
        shared_row(mod_scale_ptr, buffers[5], mod_scale_stride, sample, row, TOKENS, i, T, ONE),
    )  # fmt: skip
    if len(line) > 1:
        tile = plus_product(line[1], tile, line[0])
    else:
        tile = tile * line[0]
    return tile


@gluon.jit(do_not_specialize=["M", "TOKENS"])
def norm_quant_kernel(
    x_ptr, branch_ptr, gate_ptr, h_ptr, shift_ptr, mod_scale_ptr, weight_ptr, bias_ptr, pre_scale_ptr, signs_ptr,
    codes_ptr, scale_ptr, x_stride, branch_stride, gate_stride, shift_stride, mod_scale_stride, M, TOKENS, eps,
    LAYER: gl.constexpr, K: gl.constexpr, ONE: gl.constexpr, INT8: gl.constexpr, FP4: gl.constexpr, TINY: gl.constexpr,
    BLOCK: gl.constexpr, REGULAR: gl.constexpr, R: gl.constexpr, FEW: gl.constexpr, TEAMS: gl.constexpr,
    HELD: gl.constexpr, PRODUCT: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """R tokens for each team, half of that if they are FEW, of which TOKENS share a row of gate, shift and scale.
    ONE: so do all of the program, and its second number is that of the row."""
    WARPS: gl.constexpr = gl.num_warps() // TEAMS
    PIECES: gl.constexpr = pieces(K, 0, R, WARPS, BLOCK)
    T: gl.constexpr = tiling(PIECES, (R, WARPS, FEW, TEAMS), (BLOCK, REGULAR, HELD, PRODUCT))
    CHANGED: gl.constexpr = (
        pre_scale_ptr is not None or signs_ptr is not None or weight_ptr is not None or shift_ptr is not None
    )
    wait_for_inputs()
    pre_scales = stage(pre_scale_ptr, T, STAGED)
    all_signs = stage(signs_ptr, T, STAGED)
    weights = stage(weight_ptr, T, STAGED)
    biases = stage(bias_ptr, T, STAGED)
    sample = gl.program_id(1)
    shifts = stage_row(shift_ptr, shift_stride, sample, T, STAGED and ONE)
    scales = stage_row(mod_scale_ptr, mod_scale_stride, sample, T, STAGED and ONE)
    end_of_copies(STAGED)
    first = sample * TOKENS + gl.program_id(0) * tokens_of(T)
    tiles = ()
    for i in gl.static_range(len(T.pieces)):
        tile = gated_tile(
            x_ptr, branch_ptr, gate_ptr, h_ptr, x_stride, branch_stride, gate_stride, sample, first, M, TOKENS,
            i, T, K, ONE,
        )  # fmt: skip
        tiles = tiles + (tile,)
    start_next()
    if PRODUCT and BLOCK > 0:  # without a rotation, instructions are not too many
        tiles = normed_by_moments(tiles, eps, LAYER, K, T)
    else:
        tiles = normed(tiles, eps, LAYER, K, T)
    await_copies(STAGED)
    changed = ()
    for i in gl.static_range(len(T.pieces)):
        tile = tiles[i]
        if CHANGED:
            tile = changed_tile(
                tile, (pre_scale_ptr, signs_ptr, weight_ptr, bias_ptr),
                (pre_scales, all_signs, weights, biases, shifts, scales), shift_ptr, mod_scale_ptr, shift_stride,
                mod_scale_stride, sample, tokens(first, M, i, T), TOKENS, i, T, ONE,
            )  # fmt: skip
        changed = changed + (tile,)
    if branch_ptr is not None or not ONE:  # where registers are scarce
        first = sample * TOKENS + program_again() * tokens_of(T)
    quantize_tokens(changed, codes_ptr, scale_ptr, first, M, T, 1.0, INT8, FP4, TINY, K)
