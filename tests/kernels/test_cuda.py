"""Every Triton twin on a real GPU against its reference; a fallback is an error here."""

from collections.abc import Iterator

import pytest
import torch

from vdit_quant.kernels import codebook_decode as codebook_module
from vdit_quant.kernels import dispatch, scaled_mm
from vdit_quant.kernels import fp8_linear as fp8_module
from vdit_quant.kernels import hadamard as hadamard_module
from vdit_quant.kernels import int4_linear as int4_module
from vdit_quant.kernels import int8_linear as int8_module
from vdit_quant.kernels import int8_linear_add as add_module
from vdit_quant.kernels import int8_linear_low_rank as low_rank_module
from vdit_quant.kernels import packed_decode as packed_module
from vdit_quant.kernels import quant_token as quant_module
from vdit_quant.kernels import quant_token_fp4 as fp4_module
from vdit_quant.kernels.codebook_decode import BITS, codebook_to_int8
from vdit_quant.kernels.fp8_linear import fp8_linear, quant_token_fp8
from vdit_quant.kernels.hadamard import hadamard
from vdit_quant.kernels.int4_linear import int4_linear, int4_to_int8, int4_weight_linear
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear
from vdit_quant.kernels.int8_linear_add import int8_linear_add
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank
from vdit_quant.kernels.pack import WIDTHS, pack_bits, pack_codes
from vdit_quant.kernels.packed_decode import packed_to_int8
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.kernels.quant_token_fp4 import quant_token_fp4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")

TOKENS = (1, 17, 64, 129, 4429)
DIT_XL = [(1152, 3456), (1152, 4608), (4608, 1152), (1152, 6912)]
FLUX = [(3072, 12288), (15360, 3072)]
RAGGED = [(2240, 2240), (72, 40), (200, 130)]
SHAPES = DIT_XL + FLUX + RAGGED
GROUPED = [(k, n, g) for k, n in DIT_XL[:1] + FLUX + RAGGED for g in (None, 16, 32, 64, 128) if g is None or k % g == 0]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with dispatch.use(mode="auto", strict=True):
        yield


def as_good_as(reference, got: torch.Tensor, want: torch.Tensor, relative_rms) -> None:
    """The error of `got` to the float64 `want` is at most twice the reference's own."""
    # Two float32 sums of K terms in different orders differ by about 2**-24 * sqrt(K / 6), 3e-6 for K = 15360.
    limit = max(2 * relative_rms(reference, want), 5e-6)
    assert got.dtype == reference.dtype
    assert relative_rms(got, want) <= limit


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [72, 200, 1152, 2240, 3072, 15360])
def test_quant_token(k: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        x = make_layer(m, k, 1, dtype=dtype, device="cuda").x
        x[-1] = 0
        for got, want in zip(quant_token(x), quant_module._reference(x), strict=True):
            assert torch.equal(got, want)


def test_quant_token_rows_that_are_not_finite() -> None:
    x = torch.ones(3, 1152, device="cuda", dtype=torch.bfloat16)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    assert torch.isfinite(quant_token(x)[1]).tolist() == [True, False, False]


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_int8_linear(k: int, n: int, make_layer, relative_rms) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, device="cuda")
        args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias)
        want = a.codes.double() @ a.weight.double().t() * a.scale.double()[:, None] * a.weight_scale.double() + a.bias
        for dtype in FLOATS:
            reference = int8_module._reference(*args, dtype)
            got = int8_linear(*args, dtype)
            as_good_as(reference, got, want, relative_rms)
            assert torch.equal(got, reference)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (2, 256), (3, 43), (32, 256), (2, 4096)])
def test_int8_linear_add(samples: int, tokens: int, k: int, n: int, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(samples * tokens, k, n, device="cuda")
    residual = torch.randn(samples * tokens, n, device="cuda").to(dtype)
    gate = torch.randn(samples, 6 * n, device="cuda").to(dtype)[:, 2 * n : 3 * n]
    for chosen, bias in ((gate, a.bias), (None, None)):
        args = (a.codes, a.scale, a.weight, a.weight_scale, bias, residual, chosen)
        assert torch.equal(int8_linear_add(*args), add_module._reference(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank", [16, 32, 128])
@pytest.mark.parametrize(("k", "n"), DIT_XL[:1] + RAGGED)
def test_int8_linear_low_rank(k: int, n: int, rank: int, dtype: torch.dtype, make_layer, relative_rms) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, device="cuda")
        low, up = torch.randn(m, rank, device="cuda").to(dtype), torch.randn(n, rank, device="cuda").to(dtype)
        args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, low, up, torch.float32)
        want = a.codes.double() @ a.weight.double().t() * a.scale.double()[:, None] * a.weight_scale.double()
        want += low.double() @ up.double().t() + a.bias
        as_good_as(low_rank_module._reference(*args), int8_linear_low_rank(*args), want, relative_rms)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_int8_weight_linear(k: int, n: int, dtype: torch.dtype, make_layer, relative_rms) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, dtype=dtype, device="cuda")
        args = (a.x, a.weight, a.weight_scale, a.bias)
        want = a.x.double() @ a.weight.double().t() * a.weight_scale.double() + a.bias
        as_good_as(int8_module._weight_only_reference(*args), int8_weight_linear(*args), want, relative_rms)


@pytest.mark.parametrize(("k", "n", "group"), GROUPED)
def test_int4(k: int, n: int, group: int | None, make_layer, relative_rms) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, group, dtype=torch.bfloat16, device="cuda")
        decoded = int4_to_int8(a.packed, a.group_scale, k)
        assert torch.equal(decoded, int4_module._decode_reference(a.packed, a.group_scale, k))
        for dtype in FLOATS:
            got = int4_linear(a.codes, a.scale, a.packed, a.weight_scale, a.group_scale, a.bias, dtype)
            assert torch.equal(got, int8_linear(a.codes, a.scale, decoded, a.weight_scale, a.bias, dtype))
            x = a.x.to(dtype)
            args = (x, a.packed, a.weight_scale, a.group_scale, a.bias)
            want = x.double() @ decoded.double().t() * a.weight_scale.double() + a.bias
            as_good_as(int4_module._weight_only_reference(*args), int4_weight_linear(*args), want, relative_rms)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("k", "n", "group"), GROUPED)
def test_packed_to_int8(k: int, n: int, group: int | None, bits: int, make_layer) -> None:
    a = make_layer(1, k, n, group, device="cuda")
    packed = pack_bits(a.weight % (1 << bits) - (1 << (bits - 1)), bits)
    for odd in (False, True):
        args = (packed, a.group_scale, k, bits, odd)
        assert torch.equal(packed_to_int8(*args), packed_module._reference(*args))


@pytest.mark.parametrize("entries", BITS)
@pytest.mark.parametrize(("k", "n", "group"), GROUPED)
def test_codebook_to_int8(k: int, n: int, group: int | None, entries: int, make_layer) -> None:
    a = make_layer(1, k, n, group, device="cuda")
    for length in (1, 2, 4) if group is None else (1,):
        if k % length:
            continue
        book = torch.randint(-127, 128, (3, entries, length), device="cuda").to(torch.int8)
        packed = pack_codes(torch.randint(0, entries, (n, k // length), device="cuda"), BITS[entries])
        table = torch.randint(0, 3, (n,), device="cuda").to(torch.uint8)
        for args in ((packed, book, table, a.group_scale, k), (packed, book[:1], None, a.group_scale, k)):
            assert torch.equal(codebook_to_int8(*args), codebook_module._reference(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "group"), [(200, 0), (1152, 0), (1152, 16), (3072, 32), (15360, 128)])
def test_quant_token_fp4(k: int, group: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        x = make_layer(m, k, 1, dtype=dtype, device="cuda").x
        x[-1] = 0
        (codes, scale), (want, want_scale) = quant_token_fp4(x, group), fp4_module._reference(x, group)
        assert torch.equal(codes, want)
        torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)  # its sums may run in another order


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "size"), [("sylvester", 16), ("sylvester", 128), ("regular", 64), ("regular", 256)])
def test_hadamard(kind: str, size: int, dtype: torch.dtype, make_layer, relative_rms) -> None:
    h = hadamard_module.hadamard_matrix(size, kind).cuda().double() / size**0.5
    for m in TOKENS:
        a = make_layer(m, 9 * size, 1, dtype=dtype, device="cuda")
        signs = (a.codes[0] | 1).sign()
        want = ((a.x.double() * signs).view(-1, size) @ h).view(m, -1)
        reference = hadamard_module._reference(a.x, signs, size, kind)
        as_good_as(reference, hadamard(a.x, signs, size, kind), want, relative_rms)


needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="fp8 needs compute capability 8.9"
)


@needs_fp8
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [72, 200, 1152, 2240, 3072, 15360])
def test_quant_token_fp8(k: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        x = make_layer(m, k, 1, dtype=dtype, device="cuda").x
        x[-1] = 0
        (codes, scale), (want, want_scale) = quant_token_fp8(x), fp8_module._quant_reference(x)
        assert torch.equal(codes.view(torch.int8), want.view(torch.int8))
        assert torch.equal(scale, want_scale)


@needs_fp8
@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_fp8_linear(k: int, n: int, mode: str, make_layer, relative_rms) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, device="cuda")
        codes, scale = fp8_module._quant_reference(a.x)
        weight, weight_scale = fp8_module._quant_reference(a.weight.float())
        for dtype in FLOATS:
            args = (codes, scale, weight, weight_scale, a.bias, dtype)
            want = fp8_module._reference(*args[:-1], torch.float32)
            with dispatch.use(mode=mode):
                got = fp8_linear(*args)
            assert got.dtype == dtype
            # Hopper adds up e4m3 products with about 13 bits of mantissa.
            assert relative_rms(got, want) < 1e-3 + torch.finfo(dtype).eps


@needs_fp8
def test_fp8_runs_through_cublaslt_where_it_can(make_layer) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := scaled_mm._device_reason(device)) is not None:
        pytest.skip(reason)
    facts = {"k": 1152, "n": 3456, "out_dtype": torch.bfloat16}
    assert dispatch.explain("fp8_linear", "cuda", **facts).backend == "cublaslt"
    assert dispatch.explain("fp8_linear", "cuda", **facts | {"n": 40}).backend == "triton"
    assert dispatch.explain("fp8_linear", "cuda", **facts | {"out_dtype": torch.float32}).backend == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "n", "group"), [(1152, 3456, None), (1152, 3456, 64), (2240, 2240, 32)])
def test_a_row_does_not_depend_on_its_batch(k: int, n: int, group: int | None, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(4429, k, n, group, device="cuda")
    for op, weights in (
        (int8_linear, (a.weight, a.weight_scale, a.bias)),
        (int4_linear, (a.packed, a.weight_scale, a.group_scale, a.bias)),
    ):
        alone = op(a.codes[:1], a.scale[:1], *weights, dtype)
        for batch in (2, 17, 33, 129, 1024, 4429):
            assert torch.equal(op(a.codes[:batch], a.scale[:batch], *weights, dtype)[:1], alone)


def test_reference_on_gpu_equals_reference_on_cpu(make_layer) -> None:
    a = make_layer(129, 2240, 96)
    args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, torch.float32)
    on_gpu = int8_module._reference(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in args))
    torch.testing.assert_close(on_gpu.cpu(), int8_linear(*args), rtol=1e-6, atol=1e-6)


def test_nothing_fell_back() -> None:
    for op in dispatch.TWINS:
        if "fp8" in op and torch.cuda.get_device_capability() < (8, 9):
            continue
        expected = ("triton", "cublaslt") if op in dispatch.LIBRARIES else ("triton",)
        assert dispatch.explain(op, "cuda").backend in expected


def test_inside_a_cuda_graph_and_on_a_side_stream(make_layer) -> None:
    a = make_layer(129, 1152, 3456, 64, dtype=torch.bfloat16, device="cuda")

    def layer() -> torch.Tensor:
        codes, scale = quant_token(hadamard(a.x, None, 128, "sylvester"))
        return int4_linear(codes, scale, a.packed, a.weight_scale, a.group_scale, a.bias, torch.bfloat16)

    want = layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layer()
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
