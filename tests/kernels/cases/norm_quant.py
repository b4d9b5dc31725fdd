"""`norm_quant` and `gate_norm_quant`, to int8, fp8 and FP4."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import norm_quant as module
from vdit_quant.kernels.hadamard import hadamard, hadamard_matrix
from vdit_quant.kernels.norm_quant import (
    NORM_QUANT,
    Norm,
    gate_norm_quant,
    gate_norm_quant_fp8,
    gated_residual,
    norm_quant,
    norm_quant_fp8,
)
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.kernels.transform import Transform

from ._case import (
    E4M3,
    EVERYWHERE,
    FLOAT,
    FLOATS,
    HOPPER,
    TOLERANCE,
    TWO,
    WITH_FP8,
    Compile,
    needs_fp8,
    relative_rms,
    run_twin,
    twin,
)
from ._producer import (
    PLAIN,
    ROTATIONS,
    SIZES,
    TYPES,
    WIDTHS,
    assert_codes_agree,
    assert_codes_nearly_equal,
    assert_fp4_nearly_equal,
    few_tokens,
    tile_constants,
    transform_of,
    vectors_of,
)

FP4 = [form for form in NORM_QUANT if form.startswith("fp4")]
OPS = {
    "norm_quant": norm_quant,
    "norm_quant_fp8": norm_quant_fp8,
    **{f"norm_quant_{form}": NORM_QUANT[form] for form in FP4},
    "gate_norm_quant": gate_norm_quant,
    "gate_norm_quant_fp8": gate_norm_quant_fp8,
}
LIMITS = [
    ("norm_quant", {"k": 1000}, "K=1000 is not a multiple of 16"),
    ("gate_norm_quant_fp8", {"k": 32768}, "K=32768 is larger than 16384"),
]
LAYER = Norm([], [], "layer", 1e-6)


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    signs, regular = torch.ones(64, dtype=torch.int8), ("rms", 1e-5, 64, "regular")
    mod = list(a.x[:1].repeat(1, 2).chunk(2, dim=1))  # as adaLN gives them: two chunks of one row
    return {
        "norm_quant": [
            (a.x, [], [], [], "layer", 1e-6, 0, ""),
            (a.x.bfloat16(), mod, [a.x[0], a.x[1]], [a.x[2], signs], "layer", 1e-6, 16, "sylvester"),
        ],
        "norm_quant_fp8": [(a.x, mod, [a.x[0]], [signs], *regular)],
        **{f"norm_quant_{form}": [(a.x.repeat(1, 2), [], [], [], *regular)] for form in FP4},
        "gate_norm_quant": [
            ([a.x, a.x.bfloat16()], [], [], [a.x[0]], *regular),
            ([a.x.half(), a.x, a.x[:1]], mod, [], [], "layer", 1e-6, 0, ""),
        ],
        "gate_norm_quant_fp8": [([a.x, a.x], [], [], [], *regular)],
    }


def compile_cases() -> Iterator[Compile]:
    kernel = twin("norm_quant").norm_quant_kernel
    types = dict.fromkeys(("branch_ptr", "gate_ptr", "shift_ptr", "mod_scale_ptr", "weight_ptr", "bias_ptr"), "*i32")
    types |= {"h_ptr": "*bf16", "TOKENS": "i32", "eps": "fp32", **TYPES}
    types |= {f"{name}_stride": "i32" for name in ("branch", "gate", "shift", "mod_scale")}
    gates = ((1152, 0), (1152, 64), (1152, 128), (1536, 64), (3072, 0), (3072, 128), (5120, 128))
    for gated, shapes in ((True, gates), (False, ((1152, 0), (2240, 0), (2240, 64), (3072, 64), (5120, 0)))):
        for k, size in shapes:
            constants = {"HAS_BRANCH": gated, "HAS_GATE": gated, "HAS_MOD": True, "LAYER": True, "AFFINE": 0}
            constants |= tile_constants(k, size)
            on, units = TWO if (k, size) in ((1152, 0), (2240, 64), (5120, 128)) else HOPPER, {}
            if gated and (k, size) in ((1152, 0), (1152, 128), (3072, 128)):
                on, units = EVERYWHERE, FLOAT if size else {}
            amd = tile_constants(k, size, amd=True)
            yield Compile(f"K={k} b={size} gated={gated}", kernel, types, constants, on, units, mixed=True, amd=amd)
    for k, gated in ((1152, True), (1152, False), (3072, True), (3072, False)):
        constants = {"HAS_BRANCH": gated, "HAS_GATE": gated, "HAS_MOD": True, "LAYER": True, "AFFINE": 0}
        constants |= tile_constants(k, 0, "fp8")
        yield Compile(f"K={k} gated={gated} to fp8", kernel, types, constants, WITH_FP8)
    for k, size, out in ((1152, 0, "fp4"), (1152, 64, "fp4g16"), (3072, 128, "fp4"), (5120, 0, "fp4g16")):
        constants = {"HAS_BRANCH": False, "HAS_GATE": False, "HAS_MOD": True, "LAYER": True, "AFFINE": 0}
        constants |= tile_constants(k, size, out)
        yield Compile(f"K={k} b={size} to {out}", kernel, types, constants)


@pytest.mark.parametrize(("size", "kind"), SIZES)
@pytest.mark.parametrize("k", WIDTHS)
def interpreter_equals_reference(k: int, size: int, kind: str, make_layer, monkeypatch) -> None:
    few_tokens(monkeypatch)
    for i, dtype in enumerate(FLOATS):
        a, b = make_layer(4, k, 1, dtype=dtype), make_layer(2, 3 * k, 1, dtype=dtype).x
        mod, affine = ([], []) if i == 0 else ([b[:, :k], b[:, 2 * k :]], [a.x[0], a.x[1]][:i])
        norm, transform = ("layer", "rms")[i % 2], transform_of(a, size, kind, pre_scale=i > 0, signs=i > 1)
        want = norm_quant(a.x + 3, mod, affine, vectors_of(transform), norm, 1e-6, size, kind)
        got = run_twin("norm_quant", a.x + 3, Norm(mod, affine, norm, 1e-6), transform)
        assert_codes_nearly_equal(got, want, 1e-3 if size else 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def interpreter_gated_equals_reference(dtype: torch.dtype, make_layer, monkeypatch) -> None:
    few_tokens(monkeypatch)
    a, b = make_layer(6, 192, 1, dtype=dtype), make_layer(2, 576, 1)
    norm = Norm([b.x[:, :192], b.x[:, 192:384]], [], "layer", 1e-6)
    for stream in ([a.x, a.x.float() * 2], [a.x, a.x.flip(0), b.x[:, 384:].bfloat16()]):
        h, *quantized = run_twin("gate_norm_quant", stream[0], stream[1:], norm, PLAIN)
        assert h.dtype == dtype
        assert relative_rms(h, gated_residual(stream)) < TOLERANCE[dtype]
        assert_codes_nearly_equal(quantized, norm_quant(h, norm.mod, [], [], "layer", 1e-6, 0, ""))


@pytest.mark.parametrize(("k", "size"), [(1152, 0), (2240, 0), (192, 64), (16, 16)])
def interpreter_with_the_tiles_of_real_launches(k: int, size: int, make_layer) -> None:
    x = make_layer(2, k, 1, dtype=torch.bfloat16).x
    want = norm_quant(x, [], [], [], "layer", 1e-6, size, "sylvester")
    transform = Transform(None, None, size, "sylvester", torch.int8)
    assert_codes_nearly_equal(run_twin("norm_quant", x, LAYER, transform), want, 1e-3)


def interpreter_to_fp8(make_layer, monkeypatch) -> None:
    few_tokens(monkeypatch)
    x, fp8 = make_layer(2, 576, 1).x, Transform(None, None, 0, "", E4M3)
    want, want_scale = norm_quant_fp8(x, [], [], [], "layer", 1e-6, 0, "")
    for codes, scale in (
        run_twin("norm_quant_fp8", x, LAYER, fp8),
        run_twin("gate_norm_quant_fp8", x, [torch.zeros_like(x)], LAYER, fp8)[1:],
    ):
        torch.testing.assert_close(scale, want_scale)
        # The interpreter's cast loses the carry into the exponent, which rounding up needs now and then.
        near = (codes.float() - want.float()).abs() <= want.float().abs() / 8 + 0.002
        assert near.float().mean() > 0.9


@pytest.mark.parametrize(("out", "size"), [*((form, 0) for form in FP4), ("fp4", 64)])
def interpreter_to_fp4(out: str, size: int, make_layer, monkeypatch) -> None:
    few_tokens(monkeypatch)
    a, b = make_layer(4, 384, 1), make_layer(2, 768, 1).x
    mod, transform = [b[:, :384], b[:, 384:]], transform_of(a, size, "sylvester", out=out)
    got = run_twin(f"norm_quant_{out}", a.x, Norm(mod, [], "layer", 1e-6), transform)
    want = NORM_QUANT[out](a.x, mod, [], vectors_of(transform), "layer", 1e-6, size, "sylvester")
    assert_fp4_nearly_equal(got, want, 2e-2 if size else 1e-5)


@pytest.mark.parametrize("size", [0, 64])
def interpreter_rows_that_are_not_finite(size: int, monkeypatch) -> None:
    few_tokens(monkeypatch)
    x = torch.randn(6, 192)
    x[1, 2], x[2, 5], x[3, 191], x[4] = float("nan"), float("inf"), -float("inf"), 0
    scale = run_twin("norm_quant", x, LAYER, Transform(None, None, size, "regular", torch.int8))[1]
    assert torch.isfinite(scale).tolist() == [True, False, False, False, True, True]


def interpreter_empty_batches() -> None:
    x = torch.ones(0, 64)
    h, codes, scale = run_twin("gate_norm_quant", x, [x], Norm([], [], "rms", 1e-6), PLAIN)
    assert (h.shape, codes.shape, scale.shape) == ((0, 64), (0, 64), (0,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("k", "size", "kind"),
    [(k, *r) for k in (1152, 2240, 3072, 5120, 13824) for r in ROTATIONS if k % max(r[0], 1) == 0],
)
def cuda_equals_reference(k: int, size: int, kind: str, dtype: torch.dtype, make_layer) -> None:
    b = make_layer(3, 6 * k, 1, dtype=dtype, device="cuda").x
    mod = [b[:, k : 2 * k], b[:, 3 * k : 4 * k]]
    for m in (3, 51, 1023):
        a = make_layer(m, k, 1, dtype=dtype, device="cuda")
        transform = transform_of(a, size, kind)
        vectors = vectors_of(transform)
        for shift_scale, affine, norm in (([], [a.x[1]], "rms"), (mod, [], "layer")):
            want = module._reference(a.x, Norm(shift_scale, affine, norm, 1e-6), transform)
            assert_codes_agree(norm_quant(a.x, shift_scale, affine, vectors, norm, 1e-6, size, kind), want)
        stream = [a.x, a.x.flip(0), b[:, :k]]
        h, *quantized = gate_norm_quant(stream, mod, [], vectors, "layer", 1e-6, size, kind)
        torch.testing.assert_close(h, gated_residual(stream))
        assert_codes_agree(quantized, module._reference(h, Norm(mod, [], "layer", 1e-6), transform))


@pytest.mark.parametrize("size", [0, 128])
def cuda_loses_less_than_a_bfloat16_chain(size: int, make_layer) -> None:
    x = make_layer(1024, 1152, 1, dtype=torch.bfloat16, device="cuda").x
    h = hadamard_matrix(128, "sylvester").cuda().double() / 128**0.5
    want = torch.nn.functional.layer_norm(x.double(), (1152,), eps=1e-6)
    chain = torch.nn.functional.layer_norm(x, (1152,), eps=1e-6)
    if size:
        want, chain = (want.view(-1, 128) @ h).view(x.shape), hadamard(chain, None, size, "sylvester")
    fused = norm_quant(x, [], [], [], "layer", 1e-6, size, "sylvester")
    errors = [relative_rms(codes.double() * scale[:, None], want) for codes, scale in (fused, quant_token(chain))]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("size", [0, 64])
def cuda_rows_that_are_not_finite(size: int) -> None:
    x = torch.randn(5, 1152, device="cuda").bfloat16()
    x[1, 2], x[2, 5], x[4] = float("nan"), float("inf"), 0
    codes, scale = norm_quant(x, [], [], [], "rms", 1e-6, size, "sylvester")
    assert torch.isfinite(scale).tolist() == [True, False, False, True, True]
    assert codes[4].abs().max() == 0


@pytest.mark.parametrize("out", FP4)
@pytest.mark.parametrize(("k", "size"), [(1152, 0), (1152, 64), (3072, 128), (5120, 0)])
def cuda_to_fp4(k: int, size: int, out: str, make_layer) -> None:
    a, b = make_layer(258, k, 1, dtype=torch.bfloat16, device="cuda"), make_layer(3, 2 * k, 1, device="cuda").x
    mod, transform = [b[:, :k], b[:, k:]], transform_of(a, size, "sylvester", out=out)
    got = NORM_QUANT[out](a.x, mod, [], vectors_of(transform), "layer", 1e-6, size, "sylvester")
    # a code that rounds the other way moves the gain of its whole token; rotations are in bfloat16
    tolerance = (1e-2, 0.08) if size else (2e-3, 0.01)
    assert_fp4_nearly_equal(got, module._reference(a.x, Norm(mod, [], "layer", 1e-6), transform), *tolerance)


@needs_fp8
@pytest.mark.parametrize("size", [0, 64])
def cuda_to_fp8(size: int) -> None:
    x = torch.randn(5, 1152, device="cuda").bfloat16()
    x[4] = 0
    got = norm_quant_fp8(x, [], [], [], "rms", 1e-6, size, "sylvester")
    transform = Transform(None, None, size, "sylvester", E4M3)
    want = module._reference(x, Norm([], [], "rms", 1e-6), transform)
    torch.testing.assert_close(got[1], want[1], rtol=1e-2 if size else 1e-5, atol=0)
    # rotations are in bfloat16, whose error is many steps of a small float8
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=0.13, atol=1.0 if size else 0.01)


@pytest.mark.parametrize("size", [0, 64, 128])
@pytest.mark.parametrize("k", [1152, 3072, 5120])
def cuda_a_row_does_not_depend_on_its_batch(k: int, size: int, make_layer) -> None:
    x = make_layer(1029, k, 1, dtype=torch.bfloat16, device="cuda").x
    mod = [x[:1], x[1:2]]
    for op in (
        lambda x: norm_quant(x, mod, [], [], "layer", 1e-6, size, "sylvester"),
        lambda x: gate_norm_quant([x, x, mod[0]], mod, [], [], "layer", 1e-6, size, "sylvester"),
    ):
        whole = op(x)
        for start, stop in ((0, 1), (5, 6), (3, 20), (1, 1029), (1028, 1029)):
            for got, want in zip(op(x[start:stop]), whole, strict=True):
                assert torch.equal(got, want[start:stop])
