"""Triton twins under the interpreter against the references; `test_interpreter.py` runs this in its own process."""

import pytest
import torch
import triton.language as tl

from vdit_quant.kernels._triton import codebook_decode as codebook_twin
from vdit_quant.kernels._triton import fp8_linear as fp8_twin
from vdit_quant.kernels._triton import hadamard as hadamard_twin
from vdit_quant.kernels._triton import int4_decode as decode_twin
from vdit_quant.kernels._triton import int4_fused as fused_twin
from vdit_quant.kernels._triton import int4_linear as int4_twin
from vdit_quant.kernels._triton import int8_linear as int8_twin
from vdit_quant.kernels._triton import int8_linear_add as add_twin
from vdit_quant.kernels._triton import int8_linear_low_rank as low_rank_twin
from vdit_quant.kernels._triton import packed_decode as packed_twin
from vdit_quant.kernels._triton import quant_token as quant_twin
from vdit_quant.kernels._triton import quant_token_fp4 as fp4_twin
from vdit_quant.kernels._triton import weight_linear as weight_twin
from vdit_quant.kernels._triton.tiles import INTERPRETED
from vdit_quant.kernels.codebook_decode import BITS, codebook_to_int8
from vdit_quant.kernels.fp8_linear import E4M3, fp8_linear, quant_token_fp8
from vdit_quant.kernels.hadamard import hadamard
from vdit_quant.kernels.int4_linear import int4_linear, int4_to_int8, int4_weight_linear
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear
from vdit_quant.kernels.int8_linear_add import int8_linear_add
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank
from vdit_quant.kernels.pack import WIDTHS, block_int4, block_scales, pack_bits, pack_codes
from vdit_quant.kernels.packed_decode import packed_to_int8
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.kernels.quant_token_fp4 import quant_token_fp4

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


@pytest.mark.parametrize("group", [None, 64, 128])
def test_blocked_int4(group: int | None, make_layer, relative_rms) -> None:
    """The kernels on `block_int4` weights: decoding, the fused product, and few float tokens."""
    m, k, n = 17, 384, 40
    a = make_layer(m, k, n, group)
    blocked = block_int4(a.packed)
    scales = blocked if group is None else block_scales(a.group_scale, k)
    decoded = torch.empty(n, k, dtype=torch.int8)
    grouped = group is not None
    decode_twin.int4_blocks_kernel[(3, k // 128)](blocked, scales, decoded, n, k, GROUPED=grouped, R=16)
    assert torch.equal(decoded, int4_to_int8(a.packed, a.group_scale, k))
    y = torch.empty(m, n)
    args = (a.codes, blocked.view(torch.int8), a.scale, a.weight_scale, scales, a.bias, y, m, n, k)
    fused_twin.int4_fused_kernel[(4,)](*args, HAS_BIAS=True, GROUP=group or 0, PTX=False, BM=16, BN=32, GROUP_M=2)
    assert torch.equal(y, int8_linear(a.codes, a.scale, decoded, a.weight_scale, a.bias, torch.float32))
    args = (a.x, blocked.view(torch.int8), a.weight_scale, scales, a.bias, y, m, n, k)
    options = {"HAS_BIAS": True, "EVEN_K": True, "BITS": 4, "GROUPED": grouped, "PTX": False, "DOT": tl.float32}
    weight_twin.small_weight_kernel[(3,)](*args, **options, BM=32, BN=16, BK=128)
    assert relative_rms(y, int8_weight_linear(a.x, decoded, a.weight_scale, a.bias)) < TOLERANCE[torch.float32]


def run_ptx(program: str, inputs: dict[str, int]) -> tuple[int, int]:
    """What the integer instructions of an inline program leave in $0 and $1."""
    found = dict(inputs)

    def value(name: str) -> int:
        return found[name] if name in found else int(name, 0)

    def permute(low: int, high: int, select: int) -> int:
        both = low | high << 32
        return sum((both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i for i in range(4))

    run = {
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b,
        "mad.lo.u32": lambda a, b, c: a * b + c,
        "prmt.b32": permute,
        # every bit: the table's bit at (a, b, c)
        "lop3.b32": lambda a, b, c, table: sum(
            (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)
        ),
    }
    for line in program.strip("{}\n").splitlines():
        if not line.startswith("."):
            name, operands = line.rstrip(";").split(" ", 1)
            target, *sources = operands.split(", ")
            found[target] = run[name](*map(value, sources)) & 0xFFFFFFFF
    return found["$0"], found["$1"]


def test_inline_ptx_decodes_as_the_reference() -> None:
    """The interpreter cannot run the kernels' PTX: this does."""
    q = torch.arange(-8, 8, dtype=torch.int8)
    g = torch.Generator().manual_seed(0)
    for scale in range(256):
        codes = torch.cat((q, q))[torch.randperm(32, generator=g)][:8]
        word = sum((int(code) & 15) << 4 * i for i, code in enumerate(codes))
        offset = ((8 - 8 * scale) * 0x00100010 + 0x00080008) & 0xFFFFFFFF
        low, high = run_ptx(
            fused_twin.SCALE.value, {"$2": word, "$3": scale, "$7": scale, "$11": offset, "$15": offset}
        )
        want = [(int(code) * scale + 8) >> 4 & 255 for code in codes]
        assert [low >> 8 * i & 255 for i in range(4)] == want[0::2]
        assert [high >> 8 * i & 255 for i in range(4)] == want[1::2]
        low, high = run_ptx(fused_twin.SPLIT.value, {"$2": word})
        assert [low >> 8 * i & 255 for i in range(4)] == [int(code) & 255 for code in codes[0::2]]
        assert [high >> 8 * i & 255 for i in range(4)] == [int(code) & 255 for code in codes[1::2]]


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


@pytest.mark.parametrize("entries", BITS)
def test_codebook_to_int8(entries: int, make_layer) -> None:
    for k, n, group in [(4, 3, None), (60, 9, None), (1036, 10, None), (192, 40, 32)]:
        a = make_layer(1, k, n, group)
        for length in (1, 2, 4) if group is None else (1,):
            g = torch.Generator().manual_seed(k)
            book = torch.randint(-127, 128, (3, entries, length), generator=g).to(torch.int8)
            packed = pack_codes(torch.randint(0, entries, (n, k // length), generator=g), BITS[entries])
            for args in (
                (packed, book, (a.weight[:, 0] % 4).to(torch.uint8), a.group_scale, k),
                (packed, book[1:2], None, a.group_scale, k),
            ):
                assert torch.equal(codebook_twin.run("codebook_to_int8", *args), codebook_to_int8(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "group"), [(1, 0), (72, 0), (64, 16), (192, 32), (1152, 128)])
def test_quant_token_fp4(k: int, group: int, dtype: torch.dtype, make_layer) -> None:
    x = make_layer(9, k, 4).x.to(dtype)
    x[-1] = 0
    x[2, k // 2] = 100
    (codes, scale), (want, want_scale) = fp4_twin.run("quant_token_fp4", x, group), quant_token_fp4(x, group)
    assert torch.equal(codes, want)
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)  # its sums may run in another order


def test_quant_token_fp4_ties_and_rows_that_are_not_finite() -> None:
    x = torch.tensor([[12, 0.5, 1.5, 2.5, 5, -5, 7, 10, -10, 11, 3.5, -0.5, 0, 8, 6, 4.0]]).repeat(3, 1)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    for group in (0, 16):
        codes, scale = fp4_twin.run("quant_token_fp4", x, group)
        want, _ = quant_token_fp4(x, group)
        assert torch.equal(codes[0], want[0])
        assert torch.isfinite(scale).tolist() == [True, False, False]
    codes, _ = fp4_twin.run("quant_token_fp4", x, 0)
    assert codes[0].tolist() == [12, 0, 2, 2, 4, -4, 8, 8, -8, 12, 4, 0, 0, 8, 6, 4]


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
@pytest.mark.parametrize(("m", "k"), [(1, 1), (17, 72), (129, 200)])
def test_quant_token_fp8(m: int, k: int, dtype: torch.dtype, make_layer) -> None:
    x = make_layer(m, k, 4).x.to(dtype)
    x[-1] = 0
    x[m // 2, k // 2] = 1000
    (codes, scale), (want, want_scale) = fp8_twin.run("quant_token_fp8", x), quant_token_fp8(x)
    assert torch.equal(codes.float(), want.float())
    assert torch.equal(scale, want_scale)


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_fp8_linear(m: int, k: int, n: int, make_layer, relative_rms) -> None:
    a = make_layer(m, k, n)
    for bias, out_dtype in ((a.bias, torch.float32), (None, torch.float16)):
        args = (a.x.to(E4M3), a.scale, a.weight.to(E4M3), a.weight_scale, bias, out_dtype)
        assert relative_rms(fp8_twin.run("fp8_linear", *args), fp8_linear(*args)) < TOLERANCE[out_dtype]


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
