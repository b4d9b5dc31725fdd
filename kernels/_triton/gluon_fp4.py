"""FP4 codes for the fused producers of NVIDIA GPUs: see `quant_token_fp4` and `gluon_rows`."""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .tiles import BLOCK_LARGEST


@gluon.jit
def round_to_e2m1(t):
    """`tiles.round_to_e2m1`."""
    size = gl.maximum(gl.abs(t), 2.0)
    power = (size.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    factor = gl.full(t.shape, 6291456.0, gl.float32, t.type.layout)
    return gl.fma(power, -factor, gl.fma(power, factor, t))


@gluon.jit
def reciprocal(n):
    """1 / n, correctly rounded, of whole numbers to 255 in fp32: a division is three times as long.

    One step of Newton's is off by the square of what it corrects, 2**-46 of the result, and no 1 / n is as near as
    2**-33 to the middle of two numbers.
    """
    near = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [n], dtype=gl.float32, is_pure=True, pack=1)
    return gl.fma(gl.fma(-n, near, gl.full(n.shape, 1.0, gl.float32, n.type.layout)), near, near)


@gluon.jit
def fp4_codes(t, FP4: gl.constexpr):
    """The codes of t [R, WIDTH] as `quant_token_fp4` defines them, in fp32, and 1.5 * 2**23 more; FP4 is its group."""
    if FP4 > 0:
        blocks = gl.reshape(t, [t.shape[0], t.shape[1] // FP4, FP4])
        largest = gl.max(gl.abs(blocks), 2)
        block = gl.minimum(gl.maximum(gl.ceil(largest * (16.0 / 12.0)), 1.0), BLOCK_LARGEST)
        element = round_to_e2m1(blocks * gl.expand_dims(reciprocal(block) * 16.0, 2))
        # floor(element * block / 16 + 1/2), as the nearest to what is 1/32 more: no multiple of 1/16 is then a tie
        level = (element * gl.expand_dims(block * 0.0625, 2) + 0.03125) + 12582912.0
        raised = gl.convert_layout(gl.reshape(level, t.shape), t.type.layout, assert_trivial=True)
        codes = raised - 12582912.0
    else:
        codes = round_to_e2m1(t)
        raised = codes + 12582912.0
    return codes, raised
