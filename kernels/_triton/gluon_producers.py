"""`norm_quant`, `gate_norm_quant` and `act_quant` for NVIDIA GPUs, in Gluon: see `gluon_rows`."""

# Kernel parameters are typed by what is launched, not by annotations; tuples grow in loops that the compiler unrolls,
# and it knows no starred expression.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..norm_quant import Norm
from ..quant_token import TINY
from ..transform import Transform
from .gluon_layout import LANE, layout_of, pieces
from .gluon_moments import token_moments
from .gluon_rows import (
    await_inputs,
    load_factor,
    load_rows,
    load_vector,
    narrow,
    per_token,
    plus_product,
    program_again,
    quantize_tokens,
    spread,
    store_rows,
    tokens,
    widen,
)
from .tiles import overlap


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
def products(tiles, vectors):
    """tiles[i] * vectors[i]."""
    found = ()
    for i in gl.static_range(len(tiles)):
        found = found + (tiles[i] * vectors[i],)
    return found


@gluon.jit
def factors(pre_scale_ptr, signs_ptr, PIECES: gl.constexpr, BLOCK: gl.constexpr, HELD: gl.constexpr, R: gl.constexpr):
    """pre_scale * signs for every tile."""
    found = ()
    for i in gl.static_range(len(PIECES)):
        vector = load_factor(
            pre_scale_ptr, signs_ptr, PIECES[i][0], PIECES[i][2],
            layout_of(R, PIECES[i][1], gl.num_warps(), BLOCK, HELD),
        )  # fmt: skip
        found = found + (vector,)
    return found


@gluon.jit
def act_tile(
    x_ptr, prefix_ptr, x_stride, prefix_stride, first, M, FROM: gl.constexpr, END: gl.constexpr, LAYOUT: gl.constexpr,
    ACT: gl.constexpr, TWICE: gl.constexpr, K: gl.constexpr, PREFIX: gl.constexpr,
):  # fmt: skip
    """The prefix, act(x), or x * act(gate) where the gate is as far from x as x is wide; or TWICE that."""
    row = tokens(first, M, LAYOUT).to(gl.int64)
    if FROM < PREFIX:
        tile = widen(load_rows(prefix_ptr, row, prefix_stride, FROM, END, LAYOUT))
        if TWICE:
            tile = tile + tile
    elif ACT == "swiglu" or ACT == "geglu":
        tile = widen(load_rows(x_ptr, row, x_stride, FROM - PREFIX, END - PREFIX, LAYOUT))
        gate = widen(load_rows(x_ptr + (K - PREFIX), row, x_stride, FROM - PREFIX, END - PREFIX, LAYOUT))
        tile = tile * activate(gate, ACT, TWICE)
    else:
        tile = activate(widen(load_rows(x_ptr, row, x_stride, FROM - PREFIX, END - PREFIX, LAYOUT)), ACT, TWICE)
    return tile


@gluon.jit
def gated_tile(
    x_ptr, branch_ptr, gate_ptr, h_ptr, x_stride, branch_stride, gate_stride, sample, first, M, TOKENS,
    FROM: gl.constexpr, END: gl.constexpr, LAYOUT: gl.constexpr, K: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """x, or x + gate * branch, stored in h's type; as stored."""
    row = tokens(first, M, LAYOUT)
    h = load_rows(x_ptr, row.to(gl.int64), x_stride, FROM, END, LAYOUT)
    if branch_ptr is not None:
        tile = widen(h)
        branch = widen(load_rows(branch_ptr, row.to(gl.int64), branch_stride, FROM, END, LAYOUT))
        if gate_ptr is not None:
            gate = load_shared(gate_ptr, gate_stride, row, sample, TOKENS, FROM, END, LAYOUT, ONE)
            tile = plus_product(tile, branch, gate)
        else:
            tile = tile + branch
        h = narrow(tile, h_ptr.dtype.element_ty)
        store_rows(h_ptr, h, first, M, FROM, END, K)
    return h


@gluon.jit
def load_shared(
    ptr, stride, row, sample, TOKENS,
    FROM: gl.constexpr, END: gl.constexpr, LAYOUT: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """fp32 rows that TOKENS tokens share: [1, WIDTH] where all tokens of the tile share ONE, else [R, WIDTH]."""
    if ONE:
        rows = load_vector(ptr + sample.to(gl.int64) * stride, FROM, END, LAYOUT)
    else:
        rows = widen(load_rows(ptr, (row // TOKENS).to(gl.int64), stride, FROM, END, LAYOUT))
    return rows


@gluon.jit
def slope_and_offset(
    pre_scale_ptr, signs_ptr, weight_ptr, bias_ptr, shift_ptr, mod_scale_ptr, shift_stride, mod_scale_stride,
    sample, first, M, TOKENS, FROM: gl.constexpr, END: gl.constexpr, LAYOUT: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """((xhat * weight + bias) * (1 + scale) + shift) * pre_scale * signs as (slope, offset) of xhat, or (slope,)."""
    row = tokens(first, M, LAYOUT)
    factor = load_factor(pre_scale_ptr, signs_ptr, FROM, END, LAYOUT)
    slope = factor
    if mod_scale_ptr is not None:
        scale = load_shared(mod_scale_ptr, mod_scale_stride, row, sample, TOKENS, FROM, END, LAYOUT, ONE)
        slope = plus_product(factor, factor, scale)
    if bias_ptr is not None:
        offset = load_vector(bias_ptr, FROM, END, LAYOUT) * slope
        if shift_ptr is not None:
            shift = load_shared(shift_ptr, shift_stride, row, sample, TOKENS, FROM, END, LAYOUT, ONE)
            offset = plus_product(offset, shift, factor)
    elif shift_ptr is not None:
        offset = load_shared(shift_ptr, shift_stride, row, sample, TOKENS, FROM, END, LAYOUT, ONE) * factor
    if weight_ptr is not None:
        slope = slope * load_vector(weight_ptr, FROM, END, LAYOUT)
    if bias_ptr is not None or shift_ptr is not None:
        found = (slope, offset)
    else:
        found = (slope,)
    return found


@gluon.jit
def real(tile, FROM: gl.constexpr, END: gl.constexpr):
    """The tile with 0 in the channels that do not exist."""
    if FROM + tile.shape[1] > END:
        k = FROM + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, tile.type.layout))
        tile = gl.where(gl.expand_dims(k < END, 0), tile, 0.0)
    return tile


@gluon.jit
def normed_by_moments(
    stored, eps, LAYER: gl.constexpr, K: gl.constexpr, PIECES: gl.constexpr, BLOCK: gl.constexpr, HELD: gl.constexpr
):
    """`normed` of bfloat16 by tensor cores: fewer instructions, but they wait longer."""
    sums, squares = token_moments(stored, PIECES, BLOCK, HELD)
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
            tile = real(tile, PIECES[i][0], PIECES[i][2])
        else:
            tile = tile * spread(factor, tile)
        tiles = tiles + (tile,)
    return tiles


@gluon.jit
def normed(
    stored, eps, LAYER: gl.constexpr, K: gl.constexpr, PIECES: gl.constexpr, BLOCK: gl.constexpr, HELD: gl.constexpr
):
    """fp32 tiles: LayerNorm or RMSNorm of the tokens whose tiles these are."""
    tiles = ()
    for i in gl.static_range(len(stored)):
        tiles = tiles + (widen(stored[i]),)
    if LAYER:
        mean = per_token(tiles, False, PIECES, BLOCK, HELD) / K
        centred = ()
        for i in gl.static_range(len(tiles)):
            tile = real(tiles[i] - spread(mean, tiles[i]), PIECES[i][0], PIECES[i][2])
            centred = centred + (tile,)
        tiles = centred
    factor = gl.rsqrt(per_token(products(tiles, tiles), False, PIECES, BLOCK, HELD) / K + eps)
    scaled = ()
    for i in gl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * spread(factor, tiles[i]),)
    return scaled


@gluon.jit
def transformed(tile, line):
    """`slope_and_offset` of a tile."""
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
    BLOCK: gl.constexpr, REGULAR: gl.constexpr, R: gl.constexpr, HELD: gl.constexpr, PRODUCT: gl.constexpr,
):  # fmt: skip
    """One tile of R tokens, of which TOKENS share a row of gate, shift and scale. ONE: so do all of the tile, and the
    second number of a program is that of the row."""
    await_inputs()
    PIECES: gl.constexpr = pieces(K, 0, R, gl.num_warps(), BLOCK)
    TRANSFORMED: gl.constexpr = pre_scale_ptr is not None or signs_ptr is not None
    CHANGED: gl.constexpr = TRANSFORMED or weight_ptr is not None or shift_ptr is not None
    sample = gl.program_id(1)
    first = sample * TOKENS + gl.program_id(0) * R
    tiles = ()
    for i in gl.static_range(len(PIECES)):
        tile = gated_tile(
            x_ptr, branch_ptr, gate_ptr, h_ptr, x_stride, branch_stride, gate_stride, sample, first, M, TOKENS,
            PIECES[i][0], PIECES[i][2], layout_of(R, PIECES[i][1], gl.num_warps(), BLOCK, HELD), K, ONE,
        )  # fmt: skip
        tiles = tiles + (tile,)
    if PRODUCT and BLOCK > 0:  # without a rotation, instructions are not too many
        tiles = normed_by_moments(tiles, eps, LAYER, K, PIECES, BLOCK, HELD)
    else:
        tiles = normed(tiles, eps, LAYER, K, PIECES, BLOCK, HELD)
    changed = ()
    for i in gl.static_range(len(PIECES)):
        tile = tiles[i]
        if CHANGED:
            line = slope_and_offset(
                pre_scale_ptr, signs_ptr, weight_ptr, bias_ptr, shift_ptr, mod_scale_ptr, shift_stride,
                mod_scale_stride, sample, first, M, TOKENS, PIECES[i][0], PIECES[i][2],
                layout_of(R, PIECES[i][1], gl.num_warps(), BLOCK, HELD), ONE,
            )  # fmt: skip
            tile = transformed(tile, line)
        changed = changed + (tile,)
    # a norm alone, which has its registers, took 13.1 us in a run without this and 13.9 in one with it
    if branch_ptr is not None or not ONE:
        first = sample * TOKENS + program_again() * R
    quantize_tokens(
        changed, codes_ptr, scale_ptr, first, M, PIECES, 1.0, INT8, FP4, TINY, BLOCK, REGULAR, HELD, PRODUCT, K
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def act_quant_kernel(
    x_ptr, prefix_ptr, pre_scale_ptr, signs_ptr, codes_ptr, scale_ptr, x_stride, prefix_stride, M,
    ACT: gl.constexpr, K: gl.constexpr, PREFIX: gl.constexpr, INT8: gl.constexpr, FP4: gl.constexpr, TINY: gl.constexpr,
    BLOCK: gl.constexpr, REGULAR: gl.constexpr, R: gl.constexpr, HELD: gl.constexpr, PRODUCT: gl.constexpr,
):  # fmt: skip
    """One tile of R tokens."""
    await_inputs()
    PIECES: gl.constexpr = pieces(K, PREFIX, R, gl.num_warps(), BLOCK)
    # A rotation by products rounds to bfloat16, beside which an approximate tanh is exact.
    TWICE: gl.constexpr = ACT == "gelu_tanh" and PRODUCT and BLOCK >= 32 and not REGULAR
    first = gl.program_id(0) * R
    tiles = ()
    for i in gl.static_range(len(PIECES)):
        tile = act_tile(
            x_ptr, prefix_ptr, x_stride, prefix_stride, first, M, PIECES[i][0], PIECES[i][2],
            layout_of(R, PIECES[i][1], gl.num_warps(), BLOCK, HELD), ACT, TWICE, K, PREFIX,
        )  # fmt: skip
        tiles = tiles + (tile,)
    if pre_scale_ptr is not None or signs_ptr is not None:
        tiles = products(tiles, factors(pre_scale_ptr, signs_ptr, PIECES, BLOCK, HELD, R))
    first = program_again() * R
    quantize_tokens(
        tiles, codes_ptr, scale_ptr, first, M, PIECES, 0.5 if TWICE else 1.0, INT8, FP4, TINY, BLOCK, REGULAR, HELD,
        PRODUCT, K,
    )  # fmt: skip


MAX_HELD = 96
"""Most channels that one thread holds; more do not fit its registers."""

_WIDE = ((1536, 2, 1, 168), (2304, 2, 2, 128), (3072, 2, 2, 168), (6144, 2, 4, 128), (16384, 1, 8, 128))
SHAPES = {
    "norm": ((1280, 2, 1, 128), *_WIDE),
    "scaled": ((1280, 4, 2, 128), *_WIDE),
    "act": (
        (1280, 4, 2, 128), (2304, 2, 2, 128), (3072, 2, 2, 168), (4608, 1, 2, 128), (6144, 1, 4, 96), (16384, 1, 8, 80)
    ),
}  # fmt: skip
"""Up to so many channels: tokens and warps of a program and registers of a thread, for norms, for norms with a
scale but no rotation behind them, and without a norm. Measured on an H200."""


@cache
def launch_options(
    k: int, block_size: int, kind: str, dtype: torch.dtype = torch.bfloat16, fp4: bool = False
) -> dict[str, Any]:
    """Tokens and warps of a program, registers of a thread, channels of a block in it, and how they are rotated
    (`gluon_rotation`). kind: one of `SHAPES`.

    None of it may depend on M: the order of the sums, and so a token's codes, follow from it.
    """
    rows, warps, registers = next((shape[1:] for shape in SHAPES[kind] if k <= shape[0]), (1, 16, 128))
    if fp4 or 0 < block_size < 64:  # these take more
        registers = None
    # A product rounds to bfloat16, which an input in it has been through.
    product = dtype == torch.bfloat16
    rotation = {"HELD": max(LANE, block_size // 4) if product else 16, "PRODUCT": product}
    return {"R": rows, "num_warps": warps, "maxnreg": registers, **rotation}


@cache
def limits(k: int, prefix: int, block_size: int) -> str | None:
    """Why these kernels do not take tokens of k channels; None when they do."""
    if prefix % max(16, block_size):
        return f"a prefix of {prefix} columns ends inside of a block"
    for kind in SHAPES:
        options = launch_options(k, block_size, kind)
        covered = pieces(k, prefix, options["R"], options["num_warps"], block_size)
        channels = sum(width for _, width, _ in covered) * options["R"] // (32 * options["num_warps"])
        if len(covered) > 6 or channels > MAX_HELD:
            return f"K={k} does not fit"
    return None


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it, 16 bytes at a time; copied if need be."""
    stride = tensor.stride(0) if tensor.dim() > 1 and tensor.shape[0] > 1 else 0
    if tensor.stride(-1) != 1 or stride % 16 or stride >= 1 << 31 or tensor.data_ptr() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _stride(rows: Tensor | None) -> int:
    """Elements from one row to the next; torch leaves it open for a single row."""
    return 0 if rows is None else rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    programs: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    constants: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Launch on tensors that `_rows` has seen; compiled once for every set of dtypes and constants.

    Triton would examine every argument again at every call, which takes longer than many of these kernels.
    """
    limits = {"num_warps": options["num_warps"], "maxnreg": options["maxnreg"]}
    types = [None if t is None else t.dtype for t in tensors]
    key = (kernel, torch.cuda.current_device(), *limits.values(), constants, *types)
    compiled = _compiled.get(key)
    if compiled is None:
        more = overlap(next(t.device for t in tensors if t is not None))
        _compiled[key] = kernel[programs](*tensors, *numbers, *constants, **limits, **more)
    else:
        compiled[programs](*tensors, *numbers, *constants)


def run_act(x: Tensor, act: str, transform: Transform, prefix: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """`act_quant` for tokens of k channels."""
    codes, scale = transform.empty(x, k)
    m, p = x.shape[0], 0 if prefix is None else prefix.shape[1]
    options = launch_options(k, transform.block_size, "act", x.dtype, transform.fp4_group is not None)
    if m:
        x, prefix = _rows(x), None if prefix is None else _rows(prefix)
        tensors = (x, prefix, *_vectors(transform), codes, scale)
        numbers = (_stride(x), _stride(prefix), m)
        constants = (act, k, p, *_constants(transform, options))
        _launch(act_quant_kernel, (-(-m // options["R"]), 1, 1), tensors, numbers, constants, options)
    return codes, scale


def run_norm(stream: list[Tensor], norm: Norm, transform: Transform) -> tuple[Tensor, ...]:
    """`norm_quant` of [x], or `gate_norm_quant` of [residual, branch, gate?]."""
    m, k = stream[0].shape
    codes, scale = transform.empty(stream[0], k)
    h = torch.empty((m, k), dtype=stream[0].dtype, device=stream[0].device) if len(stream) > 1 else None
    if m:
        kind = "scaled" if transform.pre_scale is not None and not transform.block_size else "norm"
        options = launch_options(k, transform.block_size, kind, stream[0].dtype, transform.fp4_group is not None)
        samples = next((len(rows) for rows in (*norm.mod, *stream[2:])), 1)
        # Tokens that share a sample's rows; 0 where all do.
        shared = m // samples if samples > 1 else 0
        x, branch, gate = [*map(_rows, stream), None, None][:3]
        shift, mod_scale = map(_rows, norm.mod) if norm.mod else (None, None)
        weight, bias = [*map(_rows, norm.affine), None, None][:2]
        tensors = (x, branch, gate, h, shift, mod_scale, weight, bias, *_vectors(transform), codes, scale)
        numbers = (*map(_stride, (x, branch, gate, shift, mod_scale)), m, shared or m, norm.eps)
        alone = shared % options["R"] == 0 and samples < 1 << 16  # a grid is no higher
        constants = (norm.kind == "layer", k, alone, *_constants(transform, options))
        programs = (-(-(shared or m) // options["R"]), samples, 1) if alone else (-(-m // options["R"]), 1, 1)
        _launch(norm_quant_kernel, programs, tensors, numbers, constants, options)
    return (codes, scale) if h is None else (h, codes, scale)


def _vectors(transform: Transform) -> tuple[Tensor | None, Tensor | None]:
    pre_scale, signs = transform.pre_scale, transform.signs
    return None if pre_scale is None else _rows(pre_scale), None if signs is None else _rows(signs)


def _constants(transform: Transform, options: dict[str, Any]) -> tuple[Any, ...]:
    """INT8, FP4, TINY, BLOCK, REGULAR, R, HELD and PRODUCT."""
    int8, regular = transform.code_dtype == torch.int8, transform.hadamard_kind == "regular"
    block, held = transform.block_size, (options[name] for name in ("R", "HELD", "PRODUCT"))
    return int8, transform.fp4_group, TINY, block, regular and block > 0, *held
