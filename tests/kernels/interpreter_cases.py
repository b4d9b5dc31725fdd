"""Triton twins under the interpreter against the references; `test_interpreter.py` runs this in its own process."""

import pytest
import torch

from vdit_quant.kernels._triton import act_quant as act_twin
from vdit_quant.kernels._triton import hadamard as hadamard_twin
from vdit_quant.kernels._triton import int4_linear as int4_twin
from vdit_quant.kernels._triton import int8_linear as int8_twin
from vdit_quant.kernels._triton import norm_quant as norm_twin
from vdit_quant.kernels._triton import packed_decode as packed_twin
from vdit_quant.kernels._triton import quant_token as quant_twin
from vdit_quant.kernels._triton import rows
from vdit_quant.kernels._triton.tiles import INTERPRETED
from vdit_quant.kernels.act_quant import ACTS, GATED, act_quant
from vdit_quant.kernels.hadamard import hadamard
from vdit_quant.kernels.int4_linear import int4_linear, int4_to_int8, int4_weight_linear
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear
from vdit_quant.kernels.norm_quant import Norm, gated_residual, norm_quant
from vdit_quant.kernels.pack import WIDTHS, pack_bits
from vdit_quant.kernels.packed_decode import packed_to_int8
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.kernels.transform import Transform

SHAPES = [(1, 72, 33), (17, 200, 40), (129, 33, 130), (65, 320, 136)]
GROUPED = [(1, 64, 33, 16), (17, 192, 40, 32), (129, 192, 70, 64), (3, 384, 35, 128)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter truncates when it writes bf16, twice the error of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def test_the_interpreter_is_on() -> None:
    assert INTERPRETED


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (17, 72), (129, 200)])
def test_quant_token(m: int, k: int, dtype: torch.dtype, make_layer) -> None:
    x = make_layer(m, k, 4).x.to(dtype)
    x[-1] = 0
    x[m // 2, k // 2] = 100
    for got, want in zip(quant_twin.run("quant_token", x), quant_token(x), strict=True):
        assert torch.equal(got, want)


def test_quant_token_ties_and_rows_that_are_not_finite() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]]).repeat(3, 1)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    codes, scale = quant_twin.run("quant_token", x)
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    assert torch.isfinite(scale).tolist() == [True, False, False]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_int8_linear(m: int, k: int, n: int, with_bias: bool, make_layer) -> None:
    a = make_layer(m, k, n)
    args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias if with_bias else None, torch.float32)
    assert torch.equal(int8_twin.run("int8_linear", *args), int8_linear(*args))


def test_int8_linear_large_tile(make_layer, monkeypatch) -> None:
    a = make_layer(130, 260, 140)
    big = int8_twin.int8_options(10**6, 10**6)
    monkeypatch.setattr(int8_twin, "int8_options", lambda m, n: big)
    args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, torch.float32)
    assert torch.equal(int8_twin.run("int8_linear", *args), int8_linear(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_int8_weight_linear(m: int, k: int, n: int, dtype: torch.dtype, make_layer, relative_rms) -> None:
    a = make_layer(m, k, n, dtype=dtype)
    args = (a.x, a.weight, a.weight_scale, a.bias)
    got = int8_twin.run("int8_weight_linear", *args)
    assert got.dtype == dtype
    assert relative_rms(got, int8_weight_linear(*args)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("m", "k", "n", "group"), [(*shape, None) for shape in SHAPES] + GROUPED)
def test_int4(m: int, k: int, n: int, group: int | None, make_layer, relative_rms) -> None:
    a = make_layer(m, k, n, group)
    args = (a.packed, a.group_scale, k)
    assert torch.equal(int4_twin.run("int4_to_int8", *args), int4_to_int8(*args))
    args = (a.codes, a.scale, a.packed, a.weight_scale, a.group_scale, a.bias, torch.float32)
    assert torch.equal(int4_twin.run("int4_linear", *args), int4_linear(*args))
    for dtype in FLOATS:
        args = (a.x.to(dtype), a.packed, a.weight_scale, a.group_scale, a.bias)
        got = int4_twin.run("int4_weight_linear", *args)
        assert relative_rms(got, int4_weight_linear(*args)) < TOLERANCE[dtype]


def test_int4_to_int8_every_code_with_every_group_scale() -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(64).view(-1, 64).repeat(1, 4)
    group_scale = (
        torch.arange(16384, dtype=torch.int32).remainder(256).to(torch.uint8).view(256, 64)[:, :4].contiguous()
    )
    for shift in range(0, 256, 64):
        args = (packed, group_scale + shift, 512)
        assert torch.equal(int4_twin.run("int4_to_int8", *args), int4_to_int8(*args))


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_to_int8(bits: int, odd: bool, make_layer) -> None:
    for m, k, n, group in [(1, 1, 3, None), (1, 61, 9, None), (1, 1037, 10, None), *GROUPED]:
        a = make_layer(m, k, n, group)
        packed = pack_bits(a.weight % (1 << bits) - (1 << (bits - 1)), bits)
        args = (packed, a.group_scale, k, bits, odd)
        assert torch.equal(packed_twin.run("packed_to_int8", *args), packed_to_int8(*args))


@pytest.mark.parametrize(("bits", "odd"), [(2, False), (2, True), (3, False), (6, False)])
def test_packed_to_int8_every_code_with_every_group_scale(bits: int, odd: bool) -> None:
    codes = (torch.arange(64, dtype=torch.int8) % (1 << bits) - (1 << (bits - 1))).repeat(256, 1)
    args = (pack_bits(codes, bits), torch.arange(256, dtype=torch.uint8)[:, None], 64, bits, odd)
    assert torch.equal(packed_twin.run("packed_to_int8", *args), packed_to_int8(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("size", "kind"), [(16, "regular"), (64, "sylvester"), (128, "sylvester"), (256, "regular")])
def test_hadamard(size: int, kind: str, dtype: torch.dtype, relative_rms) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(17, 512, generator=g).to(dtype)
    signs = (torch.randint(0, 2, (512,), generator=g) * 2 - 1).to(torch.int8)
    for chosen in (signs, None):
        got = hadamard_twin.run("hadamard", x, chosen, size, kind)
        assert relative_rms(got, hadamard(x, chosen, size, kind)) < TOLERANCE[dtype]


def test_views_are_made_contiguous(make_layer) -> None:
    a = make_layer(17, 144, 40)
    x = a.x[:, ::2]
    for got, want in zip(quant_twin.run("quant_token", x), quant_token(x), strict=True):
        assert torch.equal(got, want)
    args = (a.codes.t().contiguous().t(), a.scale, a.weight, a.weight_scale, None, torch.float32)
    assert torch.equal(int8_twin.run("int8_linear", *args), int8_linear(*args))


def test_empty_batches(make_layer) -> None:
    a = make_layer(1, 64, 8, 32)
    assert quant_twin.run("quant_token", a.x[:0])[0].shape == (0, 64)
    rest = (a.packed, a.weight_scale, a.group_scale, None, torch.float32)
    assert int4_twin.run("int4_linear", a.codes[:0], a.scale[:0], *rest).shape == (0, 8)
    assert hadamard_twin.run("hadamard", a.x[:0], None, 64, "sylvester").shape == (0, 64)


def transform_of(a, pre_scale: bool, signs: bool, size: int, kind: str) -> Transform:
    """A transform made of the vectors of a random layer."""
    scale = a.x[0].float().abs() + 0.1 if pre_scale else None
    return Transform(scale, (a.codes[0] | 1).sign() if signs else None, size, kind, torch.int8)


def assert_codes_agree(got, want, tolerance: float = 1e-5) -> None:
    """Scales agree; codes differ by one at most, and rarely."""
    (codes, scale), (want_codes, want_scale) = got, want
    assert codes.dtype == want_codes.dtype == torch.int8
    torch.testing.assert_close(scale, want_scale, rtol=tolerance, atol=0)
    difference = (codes.int() - want_codes.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.05


@pytest.fixture
def few_tokens(monkeypatch) -> None:
    """Programs of two tokens: the interpreter runs maxima that keep nan element by element."""
    options = rows.launch_options
    monkeypatch.setattr(rows, "launch_options", lambda k, size: {**options(k, size), "R": 2})


SIZES = [(0, ""), (16, "regular"), (32, "sylvester"), (64, "regular")]
# one tile; two; two with a masked tail, whose chunks are spread over lanes
WIDTHS_OF_ROWS = [64, 192, 448]


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(("size", "kind"), SIZES)
@pytest.mark.parametrize("k", WIDTHS_OF_ROWS)
def test_norm_quant(k: int, size: int, kind: str, make_layer) -> None:
    for i, dtype in enumerate(FLOATS):
        a, b = make_layer(4, k, 1, dtype=dtype), make_layer(2, 3 * k, 1, dtype=dtype).x
        mod, affine = ([], []) if i == 0 else ([b[:, :k], b[:, 2 * k :]], [a.x[0], a.x[1]][:i])
        norm, transform = ("layer", "rms")[i % 2], transform_of(a, i > 0, i > 1 and size > 0, size, kind)
        vectors = [t for t in (transform.pre_scale, transform.signs) if t is not None]
        want = norm_quant(a.x + 3, mod, affine, vectors, norm, 1e-6, size, kind)
        got = norm_twin.run("norm_quant", a.x + 3, Norm(mod, affine, norm, 1e-6), transform)
        assert_codes_agree(got, want, 1e-3 if size else 1e-5)


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("dtype", FLOATS)
def test_gate_norm_quant(dtype: torch.dtype, make_layer, relative_rms) -> None:
    a, b = make_layer(6, 192, 1, dtype=dtype), make_layer(2, 576, 1)
    transform = Transform(None, None, 0, "", torch.int8)
    norm = Norm([b.x[:, :192], b.x[:, 192:384]], [], "layer", 1e-6)
    for stream in ([a.x, a.x.float() * 2], [a.x, a.x.flip(0), b.x[:, 384:].bfloat16()]):
        h, *quantized = norm_twin.run("gate_norm_quant", stream[0], stream[1:], norm, transform)
        assert h.dtype == dtype
        assert relative_rms(h, gated_residual(stream)) < TOLERANCE[dtype]
        assert_codes_agree(quantized, norm_quant(h, norm.mod, [], [], "layer", 1e-6, 0, ""))


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("size", "kind"), SIZES)
def test_act_quant(act: str, size: int, kind: str, make_layer) -> None:
    for k, dtype in zip(WIDTHS_OF_ROWS, FLOATS, strict=True):
        a, merged = make_layer(3, k, 1), make_layer(3, 3 * k, 1, dtype=dtype).x * 3
        x = merged[:, k:] if act in GATED else merged[:, k : 2 * k]
        transform = transform_of(a, True, size > 0, size, kind)
        want = act_quant(x, act, transform.pre_scale, transform.signs, size, kind)
        assert_codes_agree(act_twin.run("act_quant", x, act, transform), want, 1e-3 if size else 1e-5)


@pytest.mark.parametrize(("k", "size"), [(1152, 0), (2240, 0), (192, 64), (16, 16)])
def test_fused_ops_with_the_tiles_of_real_launches(k: int, size: int, make_layer) -> None:
    a = make_layer(2, k, 1, dtype=torch.bfloat16)
    want = norm_quant(a.x, [], [], [], "layer", 1e-6, size, "sylvester")
    transform = Transform(None, None, size, "sylvester", torch.int8)
    assert_codes_agree(norm_twin.run("norm_quant", a.x, Norm([], [], "layer", 1e-6), transform), want, 1e-3)


def test_fused_ops_to_fp8(make_layer) -> None:
    a = make_layer(2, 576, 1)
    codes, scale = act_twin.run("act_quant", a.x, "silu", Transform(None, None, 0, "", torch.float8_e4m3fn))
    want, want_scale = act_quant(a.x, "silu", None, None, 0, "", "fp8")
    torch.testing.assert_close(scale, want_scale)
    # The interpreter's cast loses the carry into the exponent, which rounding up needs now and then.
    near = (codes.float() - want.float()).abs() <= want.float().abs() / 8 + 0.002
    assert near.float().mean() > 0.9


def test_fused_quantisation_alone_is_quant_token(make_layer) -> None:
    x = make_layer(4, 192, 1, dtype=torch.bfloat16).x
    x[1], x[2, 3] = 0, 100
    got = act_twin.run("act_quant", x, "none", Transform(None, None, 0, "", torch.int8))
    for mine, want in zip(got, quant_token(x), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("size", [0, 64])
def test_fused_rows_that_are_not_finite_or_zero(size: int) -> None:
    x = torch.randn(6, 192, dtype=torch.float32)
    x[1, 2], x[2, 5], x[3, 191], x[4] = float("nan"), float("inf"), -float("inf"), 0
    transform = Transform(None, None, size, "regular", torch.int8)
    finite = [True, False, False, False, True, True]
    codes, scale = act_twin.run("act_quant", x, "none", transform)
    assert torch.isfinite(scale).tolist() == finite
    assert scale[4] > 0
    assert codes[4].abs().max() == 0
    codes, scale = norm_twin.run("norm_quant", x, Norm([], [], "layer", 1e-6), transform)
    assert torch.isfinite(scale).tolist() == finite


@pytest.mark.usefixtures("few_tokens")
def test_fused_rotation_keeps_any_magnitude(make_layer) -> None:
    x = make_layer(4, 192, 1).x * torch.tensor([1e-25, 1e-3, 1e9, 1e34])[:, None]
    transform = Transform(None, None, 64, "sylvester", torch.int8)
    want = act_quant(x, "none", None, None, 64, "sylvester")
    assert_codes_agree(act_twin.run("act_quant", x, "none", transform), want, 1e-3)


def test_fused_ops_of_nothing(make_layer) -> None:
    x, transform = make_layer(1, 64, 1).x[:0], Transform(None, None, 0, "", torch.int8)
    assert act_twin.run("act_quant", x, "gelu", transform)[0].shape == (0, 64)
    h, codes, scale = norm_twin.run("gate_norm_quant", x, [x], Norm([], [], "rms", 1e-6), transform)
    assert (h.shape, codes.shape, scale.shape) == ((0, 64), (0, 64), (0,))
