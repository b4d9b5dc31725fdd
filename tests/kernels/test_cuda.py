"""Every Triton twin on a real GPU against its reference; a fallback is an error here."""

from collections.abc import Iterator

import pytest
import torch

from vdit_quant.kernels import act_quant as act_module
from vdit_quant.kernels import dispatch
from vdit_quant.kernels import hadamard as hadamard_module
from vdit_quant.kernels import int4_linear as int4_module
from vdit_quant.kernels import int8_linear as int8_module
from vdit_quant.kernels import norm_quant as norm_module
from vdit_quant.kernels import packed_decode as packed_module
from vdit_quant.kernels import quant_token as quant_module
from vdit_quant.kernels.act_quant import ACTS, GATED, act_quant
from vdit_quant.kernels.hadamard import hadamard
from vdit_quant.kernels.int4_linear import int4_linear, int4_to_int8, int4_weight_linear
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear
from vdit_quant.kernels.norm_quant import Norm, gate_norm_quant, norm_quant, norm_quant_fp8
from vdit_quant.kernels.pack import WIDTHS, pack_bits
from vdit_quant.kernels.packed_decode import packed_to_int8
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.kernels.transform import Transform

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


def codes_agree(got, want, relative_rms) -> None:
    """Codes differ by one at most; what they stand for is as close to `want` as its own rounding."""
    (codes, scale), (want_codes, want_scale) = got, want
    torch.testing.assert_close(scale, want_scale, rtol=2e-3, atol=0)
    assert (codes.int() - want_codes.int()).abs().max() <= 1
    assert relative_rms(codes.double() * scale.double()[:, None], want_codes.double() * want_scale[:, None]) < 2e-3


ROTATIONS = [(0, ""), (16, "regular"), (64, "sylvester"), (128, "sylvester")]
WIDTHS_OF_TOKENS = [1152, 2240, 3072, 5120, 13824]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("size", "kind"), ROTATIONS)
@pytest.mark.parametrize("k", WIDTHS_OF_TOKENS)
def test_norm_quant(k: int, size: int, kind: str, dtype: torch.dtype, make_layer, relative_rms) -> None:
    if k % max(size, 1):
        return
    b = make_layer(3, 6 * k, 1, dtype=dtype, device="cuda").x
    for m in (3, 51, 1023):
        a = make_layer(m, k, 1, dtype=dtype, device="cuda")
        signs = (a.codes[0] | 1).sign()
        transform = Transform(a.x[0].float().abs() + 0.1, signs if size else None, size, kind, torch.int8)
        vectors = [t for t in (transform.pre_scale, transform.signs) if t is not None]
        for mod, affine, norm in (([], [a.x[1]], "rms"), ([b[:, k : 2 * k], b[:, 3 * k : 4 * k]], [], "layer")):
            want = norm_module._reference(a.x, Norm(mod, affine, norm, 1e-6), transform)
            codes_agree(norm_quant(a.x, mod, affine, vectors, norm, 1e-6, size, kind), want, relative_rms)
        stream = [a.x, a.x.flip(0), b[:, :k]]
        h, *quantized = gate_norm_quant(stream, mod, [], vectors, "layer", 1e-6, size, kind)
        torch.testing.assert_close(h, norm_module.gated_residual(stream))
        want = norm_module._reference(h, Norm(mod, [], "layer", 1e-6), transform)
        codes_agree(quantized, want, relative_rms)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("k", [1152, 4608, 12288, 15360])
def test_act_quant(k: int, act: str, dtype: torch.dtype, make_layer, relative_rms) -> None:
    for size, kind in ROTATIONS:
        for m in (1, 129):
            a = make_layer(m, 3 * k, 1, dtype=dtype, device="cuda")
            x = a.x[:, k:] if act in GATED else a.x[:, k : 2 * k]
            signs = (a.codes[0, :k] | 1).sign().contiguous() if size else None
            transform = Transform(a.x[0, :k].float().abs() + 0.1, signs, size, kind, torch.int8)
            want = act_module._reference(x, act, transform)
            codes_agree(act_quant(x, act, transform.pre_scale, signs, size, kind), want, relative_rms)


@pytest.mark.parametrize("size", [0, 128])
def test_fused_ops_lose_less_than_a_bfloat16_chain(size: int, make_layer, relative_rms) -> None:
    x = make_layer(1024, 1152, 1, dtype=torch.bfloat16, device="cuda").x
    h = hadamard_module.hadamard_matrix(128, "sylvester").cuda().double() / 128**0.5
    want = torch.nn.functional.layer_norm(x.double(), (1152,), eps=1e-6)
    chain = torch.nn.functional.layer_norm(x, (1152,), eps=1e-6)
    if size:
        want, chain = (want.view(-1, 128) @ h).view(x.shape), hadamard(chain, None, size, "sylvester")
    fused = norm_quant(x, [], [], [], "layer", 1e-6, size, "sylvester")
    errors = [relative_rms(codes.double() * scale[:, None], want) for codes, scale in (fused, quant_token(chain))]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("size", [0, 64])
def test_fused_rows_that_are_not_finite_and_fp8(size: int) -> None:
    x = torch.randn(5, 1152, device="cuda").bfloat16()
    x[1, 2], x[2, 5], x[4] = float("nan"), float("inf"), 0
    for codes, scale in (
        act_quant(x, "none", None, None, size, "sylvester"),
        norm_quant(x, [], [], [], "rms", 1e-6, size, "sylvester"),
    ):
        assert torch.isfinite(scale).tolist() == [True, False, False, True, True]
        assert codes[4].abs().max() == 0
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8_e4m3fn needs compute capability 8.9")
    x[1:3] = 1
    got = norm_quant_fp8(x, [], [], [], "rms", 1e-6, size, "sylvester")
    transform = Transform(None, None, size, "sylvester", torch.float8_e4m3fn)
    want = norm_module._reference(x, Norm([], [], "rms", 1e-6), transform)
    torch.testing.assert_close(got[1], want[1], rtol=2e-3, atol=0)
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=0.13, atol=0.01)


@pytest.mark.parametrize("size", [0, 64, 128])
@pytest.mark.parametrize("k", [1152, 3072, 5120])
def test_a_fused_row_does_not_depend_on_its_batch(k: int, size: int, make_layer) -> None:
    a = make_layer(1029, k, 1, dtype=torch.bfloat16, device="cuda")
    mod = [a.x[:1], a.x[1:2]]
    ops = (
        lambda x: norm_quant(x, mod, [], [], "layer", 1e-6, size, "sylvester"),
        lambda x: gate_norm_quant([x, x, mod[0]], mod, [], [], "layer", 1e-6, size, "sylvester"),
        lambda x: act_quant(x, "gelu_tanh", None, None, size, "sylvester"),
    )
    for op in ops:
        whole = op(a.x)
        for start, stop in ((0, 1), (5, 6), (3, 20), (1, 1029), (1028, 1029)):
            for got, want in zip(op(a.x[start:stop]), whole, strict=True):
                assert torch.equal(got, want[start:stop])


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
        assert dispatch.explain(op, "cuda") == dispatch.Choice(op, "triton", "supported")


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
