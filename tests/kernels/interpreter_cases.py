"""Triton twins under the interpreter against the references; `test_interpreter.py` runs this in its own process."""

import pytest
import torch

from vdit_quant.kernels._triton import attention as attention_twin
from vdit_quant.kernels._triton import hadamard as hadamard_twin
from vdit_quant.kernels._triton import head_norm_rope as head_norm_rope_twin
from vdit_quant.kernels._triton import int4_decode as decode_twin
from vdit_quant.kernels._triton import int4_linear as int4_twin
from vdit_quant.kernels._triton import int8_linear as int8_twin
from vdit_quant.kernels._triton import int8_linear_add as add_twin
from vdit_quant.kernels._triton import int8_linear_low_rank as low_rank_twin
from vdit_quant.kernels._triton import packed_decode as packed_twin
from vdit_quant.kernels._triton import quant_token as quant_twin
from vdit_quant.kernels._triton import weight_linear as weight_twin
from vdit_quant.kernels._triton.tiles import INTERPRETED
from vdit_quant.kernels.attention import attention
from vdit_quant.kernels.hadamard import hadamard
from vdit_quant.kernels.head_norm_rope import head_norm_rope
from vdit_quant.kernels.int4_linear import int4_linear, int4_to_int8, int4_weight_linear
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear
from vdit_quant.kernels.int8_linear_add import int8_linear_add
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank
from vdit_quant.kernels.pack import WIDTHS, pack_bits
from vdit_quant.kernels.packed_decode import packed_to_int8
from vdit_quant.kernels.quant_token import quant_token

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("m", "k", "n", "samples"), [(1, 72, 33, 1), (34, 200, 40, 2), (130, 33, 130, 5), (128, 64, 40, 2)]
)
def test_int8_linear_add(m: int, k: int, n: int, samples: int, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(m, k, n)
    residual = make_layer(m, n, 1).x.to(dtype)
    gate = make_layer(samples, 6 * n, 1).x.to(dtype)[:, 2 * n : 3 * n]
    for chosen, bias in ((gate, a.bias), (gate.t().contiguous().t(), None), (None, a.bias)):
        args = (a.codes, a.scale, a.weight, a.weight_scale, bias, residual, chosen)
        assert torch.equal(add_twin.run("int8_linear_add", *args), int8_linear_add(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "n", "rank"), [(1, 72, 33, 16), (17, 200, 40, 5), (129, 33, 130, 40)])
def test_int8_linear_low_rank(m: int, k: int, n: int, rank: int, dtype: torch.dtype, make_layer, relative_rms) -> None:
    a = make_layer(m, k, n)
    low, up = make_layer(m, rank, 1).x.to(dtype), make_layer(n, rank, 2).x.to(dtype)
    for bias in (a.bias, None):
        args = (a.codes, a.scale, a.weight, a.weight_scale, bias, low, up, torch.float32)
        got = low_rank_twin.run("int8_linear_low_rank", *args)
        assert relative_rms(got, int8_linear_low_rank(*args)) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_int8_weight_linear(m: int, k: int, n: int, dtype: torch.dtype, make_layer, relative_rms) -> None:
    a = make_layer(m, k, n, dtype=dtype)
    args = (a.x, a.weight, a.weight_scale, a.bias)
    got = weight_twin.run("int8_weight_linear", *args)
    assert got.dtype == dtype
    assert relative_rms(got, int8_weight_linear(*args)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("m", "k", "n", "group"), [(*shape, None) for shape in SHAPES] + GROUPED)
def test_int4(m: int, k: int, n: int, group: int | None, make_layer, relative_rms) -> None:
    a = make_layer(m, k, n, group)
    args = (a.packed, a.group_scale, k)
    assert torch.equal(decode_twin.run("int4_to_int8", *args), int4_to_int8(*args))
    args = (a.codes, a.scale, a.packed, a.weight_scale, a.group_scale, a.bias, torch.float32)
    assert torch.equal(int4_twin.run("int4_linear", *args), int4_linear(*args))
    for dtype in FLOATS:
        args = (a.x.to(dtype), a.packed, a.weight_scale, a.group_scale, a.bias)
        got = weight_twin.run("int4_weight_linear", *args)
        assert relative_rms(got, int4_weight_linear(*args)) < TOLERANCE[dtype]


def test_int4_to_int8_every_code_with_every_group_scale() -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(64).view(-1, 64).repeat(1, 4)
    group_scale = (
        torch.arange(16384, dtype=torch.int32).remainder(256).to(torch.uint8).view(256, 64)[:, :4].contiguous()
    )
    for shift in range(0, 256, 64):
        args = (packed, group_scale + shift, 512)
        assert torch.equal(decode_twin.run("int4_to_int8", *args), int4_to_int8(*args))


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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 72), (2, 16)])
@pytest.mark.parametrize("every", [False, True])
def test_head_norm_rope(heads: int, head_dim: int, every: bool, dtype: torch.dtype, relative_rms) -> None:
    g = torch.Generator().manual_seed(0)
    width = heads * head_dim
    first, second = (torch.randn(2, t, 4 * width, generator=g).to(dtype)[..., : 3 * width] for t in (3, 4))
    weights = [torch.randn(width if every else head_dim, generator=g).to(dtype) for _ in range(4)]
    rope = [torch.randn(7, head_dim, generator=g) for _ in range(2)]
    for args in (
        (first, weights[:2], second, weights[2:], rope, heads, 1e-6),
        (first, [], second, weights[2:], [], heads, 1e-6),
        (second, weights[:2], None, [], [table[:4] for table in rope], heads, 1e-6),
    ):
        got, want = head_norm_rope_twin.run("head_norm_rope", *args), head_norm_rope(*args)
        assert got.dtype == dtype
        assert relative_rms(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "keys", "head_dim"), [(130, 70, 72), (5, 129, 16), (64, 128, 128), (1, 1, 80)])
def test_attention(tokens: int, keys: int, head_dim: int, dtype: torch.dtype, relative_rms) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, tokens, 3, 2, head_dim, generator=g).to(dtype)[:, :, 1]
    k, v = torch.randn(2, keys, 2, 2, head_dim, generator=g).to(dtype).unbind(2)
    args = (q, k, v, head_dim**-0.5)
    got = attention_twin.run("attention", *args)
    assert got.dtype == dtype
    # Weights are rounded to the dtype before they meet the values, as in every 16-bit attention.
    assert relative_rms(got, attention(*args)) < 2 * TOLERANCE[dtype]


def test_attention_copies_only_views_that_vectors_do_not_fit() -> None:
    merged = torch.randn(2, 5, 3, 2, 24)
    q, k, v = merged.unbind(2)
    view, strides = attention_twin.in_vectors(k)
    assert view is k
    assert strides == [90, 18, 3]
    shifted = torch.randn(2, 5, 3, 49)[..., 1:].unflatten(-1, (2, 24)).unbind(2)
    assert attention_twin.in_vectors(shifted[0])[0].is_contiguous()
    for args in ((q, k, v), shifted, tuple(x.mT.contiguous().mT for x in (q, k, v))):
        torch.testing.assert_close(attention_twin.run("attention", *args, 0.2), attention(*args, 0.2))


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
