"""The kernel of `act_quant` for NVIDIA GPUs, in Gluon: see `gluon_rows`."""

# Kernel parameters are typed by what is launched, not by annotations; tuples grow in loops that the compiler unrolls,
# and it knows no starred expression.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_layout import layout, pieces, tiling, tokens_of
from .gluon_rows import load_rows, program_again, quantize_tokens, start_next, tokens, wait_for_inputs, widen
from .gluon_vectors import await_copies, end_of_copies, factor_of, stage, vector_of


@gluon.jit
def sigmoid_of_log2(t):
    """1 / (1 + 2**-t) in four instructions: no case of it needs denormals."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 p; neg.f32 p, $1; ex2.approx.ftz.f32 p, p; add.f32 p, p, 0f3F800000;
        rcp.approx.ftz.f32 $0, p; }""",
        "=f,f", [t], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def tanh(t):
    """To 2**-11, in one instruction."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [t], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def activate(x, ACT: gl.constexpr, TWICE: gl.constexpr):
    """gelu(x) = x/2 (1 + erf(x / sqrt 2)); its tanh form is x/2 (1 + tanh p) = x sigmoid(2 p) with
    p = sqrt(2/pi) (x + 0.044715 x**3). TWICE: twice that, and not exactly; for gelu_tanh alone."""
    if TWICE:
        x = x + x * tanh(x * (0.7978845608 + 0.0356774081 * (x * x)))
    elif ACT == "gelu_tanh":
        # 2.3022... = 2 sqrt(2/pi) log2(e), 0.10294... = 0.044715 of it.
        x = x * sigmoid_of_log2(x * (2.302208198 + 0.1029432395 * (x * x)))
    elif ACT == "silu" or ACT == "swiglu":
        x = x * sigmoid_of_log2(x * 1.442695041)
    elif ACT == "gelu" or ACT == "geglu":
        half = 0.5 * x
        x = half + half * gl.erf(x * 0.7071067812)
    return x


@gluon.jit
def act_tile(
    x_ptr, prefix_ptr, x_stride, prefix_stride, first, M, i: gl.constexpr, T: gl.constexpr,
    ACT: gl.constexpr, K: gl.constexpr, PREFIX: gl.constexpr,
):  # fmt: skip
    """What `activated` takes, as stored: (of the prefix,), (x,), or (x, gate) where the gate is as far from x as x is
    wide."""
    LAYOUT: gl.constexpr = layout(T, i)
    FROM: gl.constexpr = T.pieces[i][0]
    END: gl.constexpr = T.pieces[i][2]
    row = tokens(first, M, i, T).to(gl.int64)
    if FROM < PREFIX:
        tile = (load_rows(prefix_ptr, row, prefix_stride, FROM, END, LAYOUT),)
    else:
        tile = (load_rows(x_ptr, row, x_stride, FROM - PREFIX, END - PREFIX, LAYOUT),)
        if ACT == "swiglu" or ACT == "geglu":
            tile = tile + (load_rows(x_ptr + (K - PREFIX), row, x_stride, FROM - PREFIX, END - PREFIX, LAYOUT),)
    return tile


@gluon.jit
def activated(stored, IS_PREFIX: gl.constexpr, ACT: gl.constexpr, TWICE: gl.constexpr):
    """The prefix, act(x), or x * act(gate); or TWICE that."""
    tile = widen(stored[0])
    if IS_PREFIX:
        if TWICE:
            tile = tile + tile
    elif len(stored) > 1:
        tile = tile * activate(widen(stored[1]), ACT, TWICE)
    else:
        tile = activate(tile, ACT, TWICE)
    return tile


@gluon.jit(do_not_specialize=["M"])
def act_quant_kernel(
    x_ptr, prefix_ptr, pre_scale_ptr, signs_ptr, codes_ptr, scale_ptr, x_stride, prefix_stride, M,
    ACT: gl.constexpr, K: gl.constexpr, PREFIX: gl.constexpr, INT8: gl.constexpr, FP4: gl.constexpr, TINY: gl.constexpr,
    BLOCK: gl.constexpr, REGULAR: gl.constexpr, R: gl.constexpr, FEW: gl.constexpr, TEAMS: gl.constexpr,
    HELD: gl.constexpr, PRODUCT: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """R tokens for each team, half of that if they are FEW."""
    WARPS: gl.constexpr = gl.num_warps() // TEAMS
    PIECES: gl.constexpr = pieces(K, PREFIX, R, WARPS, BLOCK)
    T: gl.constexpr = tiling(PIECES, (R, WARPS, FEW, TEAMS), (BLOCK, REGULAR, HELD, PRODUCT))
    # A rotation by products rounds to bfloat16, beside which an approximate tanh is exact.
    TWICE: gl.constexpr = ACT == "gelu_tanh" and PRODUCT and BLOCK >= 32 and not REGULAR
    wait_for_inputs()
    pre_scales = stage(pre_scale_ptr, T, STAGED)
    all_signs = stage(signs_ptr, T, STAGED)
    end_of_copies(STAGED)
    first = gl.program_id(0) * tokens_of(T)
    stored = ()
    for i in gl.static_range(len(T.pieces)):
        stored = stored + (act_tile(x_ptr, prefix_ptr, x_stride, prefix_stride, first, M, i, T, ACT, K, PREFIX),)
    start_next()
    await_copies(STAGED)
    tiles = ()
    for i in gl.static_range(len(T.pieces)):
        tile = activated(stored[i], T.pieces[i][0] < PREFIX, ACT, TWICE)
        if pre_scale_ptr is not None or signs_ptr is not None:
            tile = tile * factor_of(
                vector_of(pre_scale_ptr, pre_scales, i, T), vector_of(signs_ptr, all_signs, i, T), layout(T, i)
            )
        tiles = tiles + (tile,)
    first = program_again() * tokens_of(T)
    quantize_tokens(tiles, codes_ptr, scale_ptr, first, M, T, 0.5 if TWICE else 1.0, INT8, FP4, TINY, K)
