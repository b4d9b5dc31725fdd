from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import act_quant as module
from vdit_quant.kernels.act_quant import ACTS, GATED, act_quant
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.kernels.quant_token_fp4 import quant_token_fp4
from vdit_quant.kernels.transform import FORMS, Transform

from ._case import E4M3, EVERYWHERE, FLOAT, FLOATS, HOPPER, TWO, WITH_FP8, Compile, run_twin, twin
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
)

OPS = {"act_quant": act_quant}
LIMITS = [
    ("act_quant", {"block_size": 256, "k": 3072}, "block_size 256 is outside 16 to 128"),
    ("act_quant", {"block_size": 64, "k": 13824, "dtype": torch.bfloat16}, None),
]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    signs = torch.ones(64, dtype=torch.int8)
    return {
        "act_quant": [
            *((a.x, act, None, None, 0, "") for act in ACTS),
            (a.x.bfloat16(), "gelu_tanh", a.x[0], signs, 16, "regular", "fp8"),
            (a.x.repeat(1, 3)[:, 64:], "swiglu", None, None, 64, "regular"),
            (a.x, "none", None, None, 0, "", "fp4"),
            (a.x, "silu", None, None, 64, "sylvester", "fp4g16", a.x),
        ]
    }


def compile_cases() -> Iterator[Compile]:
    kernel, types = twin("act_quant").act_quant_kernel, {"HALF": "i32", **TYPES}
    shapes = ((1152, 0), (1152, 16), (4608, 0), (4608, 128), (12288, 0), (12288, 128), (13824, 128), (15360, 64))
    for k, size in shapes:
        constants = {"ACT": "gelu_tanh" if k > 4000 else "none", **tile_constants(k, size)}
        on, units = TWO if (k, size) in ((1152, 16), (13824, 128)) else HOPPER, {}
        if (k, size) == (4608, 128):
            on, units = EVERYWHERE, FLOAT
        amd = tile_constants(k, size, amd=True)
        yield Compile(f"K={k} b={size}", kernel, types, constants, on, units, mixed=True, amd=amd)
    for act in ("gelu", "swiglu", "geglu"):
        yield Compile(f"K=12288 {act}", kernel, types, {"ACT": act, **tile_constants(12288, 0)})
    for k, size in ((1152, 0), (3072, 128), (4608, 0), (15360, 0)):
        constants = {"ACT": "gelu_tanh" if k > 4000 else "none", **tile_constants(k, size, "fp8")}
        units = {name: FLOAT[name] for name in WITH_FP8} if size else {}
        yield Compile(f"K={k} b={size} to fp8", kernel, types, constants, WITH_FP8, units, mixed=True)
    for k, size, out in ((1152, 0, "fp4"), (4608, 64, "fp4"), (4608, 64, "fp4g16"), (15360, 0, "fp4g128")):
        constants = {"ACT": "gelu_tanh", **tile_constants(k, size, out)}
        yield Compile(f"K={k} b={size} to {out}", kernel, types, constants)


@pytest.mark.parametrize(
    ("act", "size", "kind"),
    [*((act, 0, "") for act in ACTS), *(("gelu_tanh", *size) for size in SIZES[1:]), ("swiglu", 64, "regular")],
)
def interpreter_equals_reference(act: str, size: int, kind: str, make_layer, monkeypatch) -> None:
    few_tokens(monkeypatch)
    for k, dtype in zip(WIDTHS, FLOATS, strict=True):
        a, merged = make_layer(3, k, 1), make_layer(3, 3 * k, 1, dtype=dtype).x * 3
        x = merged[:, k:] if act in GATED else merged[:, k : 2 * k]
        transform = transform_of(a, size, kind)
        want = act_quant(x, act, transform.pre_scale, transform.signs, size, kind)
        assert_codes_nearly_equal(run_twin("act_quant", x, act, transform), want, 1e-3 if size else 1e-5)


def interpreter_to_fp8(make_layer) -> None:
    x = make_layer(2, 576, 1).x
    codes, scale = run_twin("act_quant", x, "silu", Transform(None, None, 0, "", E4M3))
    want, want_scale = act_quant(x, "silu", None, None, 0, "", "fp8")
    torch.testing.assert_close(scale, want_scale)
    # The interpreter's cast loses the carry into the exponent, which rounding up needs now and then.
    near = (codes.float() - want.float()).abs() <= want.float().abs() / 8 + 0.002
    assert near.float().mean() > 0.9


@pytest.mark.parametrize("out", ["fp4", "fp4g16", "fp4g64"])
@pytest.mark.parametrize(("act", "size", "kind"), [("none", 0, ""), ("geglu", 0, ""), ("gelu_tanh", 64, "regular")])
def interpreter_to_fp4(out: str, act: str, size: int, kind: str, make_layer, monkeypatch) -> None:
    few_tokens(monkeypatch)
    for k, dtype in ((192, torch.bfloat16), (448, torch.float32)):
        a, merged = make_layer(3, k, 1), make_layer(3, 3 * k, 1, dtype=dtype).x * 3
        x = merged[:, k:] if act in GATED else merged[:, k : 2 * k]
        transform = transform_of(a, size, kind, out=out)
        want = act_quant(x, act, transform.pre_scale, transform.signs, size, kind, out)
        assert_fp4_nearly_equal(run_twin("act_quant", x, act, transform), want, 2e-2 if size else 1e-5)


@pytest.mark.parametrize(("out", "group"), [("fp4", 0), ("fp4g32", 32)])
def interpreter_alone_is_quant_token_fp4(out: str, group: int, make_layer) -> None:
    x = make_layer(5, 192, 1).x
    ties = torch.tensor([12, 0.5, 1.5, 2.5, 3.5, 5, 7, 10, -0.5, -1.5, -2.5, -5, -7, -10, 0, 11.0])
    x[0], x[1], x[2, 3] = ties.repeat(12), 0, 100
    codes, scale = run_twin("act_quant", x, "none", Transform(None, None, 0, "", *FORMS[out]))
    want, want_scale = quant_token_fp4(x, group)
    assert torch.equal(codes, want)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)


def interpreter_alone_is_quant_token(make_layer) -> None:
    x = make_layer(4, 192, 1, dtype=torch.bfloat16).x
    x[1], x[2, 3] = 0, 100
    for got, want in zip(run_twin("act_quant", x, "none", PLAIN), quant_token(x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("size", [0, 64])
def interpreter_rows_that_are_not_finite_or_zero(size: int, monkeypatch) -> None:
    few_tokens(monkeypatch)
    x = torch.randn(6, 192)
    x[1, 2], x[2, 5], x[3, 191], x[4] = float("nan"), float("inf"), -float("inf"), 0
    codes, scale = run_twin("act_quant", x, "none", Transform(None, None, size, "regular", torch.int8))
    assert torch.isfinite(scale).tolist() == [True, False, False, False, True, True]
    assert scale[4] > 0
    assert codes[4].abs().max() == 0


def interpreter_rotation_keeps_any_magnitude(make_layer, monkeypatch) -> None:
    few_tokens(monkeypatch)
    x = make_layer(4, 192, 1).x * torch.tensor([1e-25, 1e-3, 1e9, 1e34])[:, None]
    want = act_quant(x, "none", None, None, 64, "sylvester")
    got = run_twin("act_quant", x, "none", Transform(None, None, 64, "sylvester", torch.int8))
    assert_codes_nearly_equal(got, want, 1e-3)


def interpreter_empty_batches() -> None:
    assert run_twin("act_quant", torch.ones(0, 64), "gelu", PLAIN)[0].shape == (0, 64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("k", [1152, 4608, 12288, 15360])
def cuda_equals_reference(k: int, act: str, dtype: torch.dtype, make_layer) -> None:
    for size, kind in ROTATIONS:
        for m in (1, 129):
            a = make_layer(m, 3 * k, 1, dtype=dtype, device="cuda")
            x = a.x[:, k:] if act in GATED else a.x[:, k : 2 * k]
            transform = transform_of(a, size, kind, k)
            want = module._reference(x, act, transform)
            assert_codes_agree(act_quant(x, act, transform.pre_scale, transform.signs, size, kind), want)


@pytest.mark.parametrize("out", ["fp4", "fp4g16", "fp4g128"])
@pytest.mark.parametrize("k", [1152, 4608, 15360])
def cuda_to_fp4(k: int, out: str, make_layer) -> None:
    for act, (size, kind) in (("none", ROTATIONS[0]), ("swiglu", ROTATIONS[0]), ("gelu_tanh", ROTATIONS[2])):
        for m in (1, 129):
            a = make_layer(m, 3 * k, 1, dtype=torch.bfloat16, device="cuda")
            x = a.x[:, k:] if act in GATED else a.x[:, k : 2 * k]
            transform = transform_of(a, size, kind, k, out=out)
            got = act_quant(x, act, transform.pre_scale, transform.signs, size, kind, out)
            tolerance = (1e-2, 0.08) if size else (1e-3, 0.01)  # rotated in bfloat16
            assert_fp4_nearly_equal(got, module._reference(x, act, transform), *tolerance)


@pytest.mark.parametrize("k", [1152, 3072, 12288])
def cuda_alone_is_quant_token_fp4(k: int, make_layer) -> None:
    x = make_layer(129, k, 1, device="cuda").x
    x[1], x[2, :4] = 0, torch.tensor([12, 5, -7, 2.5])
    for out, group in (("fp4", 0), ("fp4g16", 16), ("fp4g32", 32), ("fp4g64", 64), ("fp4g128", 128)):
        codes, scale = act_quant(x, "none", None, None, 0, "", out)
        want, want_scale = quant_token_fp4(x, group)
        assert torch.equal(codes, want)
        torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [0, 64])
def cuda_rows_that_are_not_finite(size: int) -> None:
    x = torch.randn(5, 1152, device="cuda").bfloat16()
    x[1, 2], x[2, 5], x[4] = float("nan"), float("inf"), 0
    codes, scale = act_quant(x, "none", None, None, size, "sylvester")
    assert torch.isfinite(scale).tolist() == [True, False, False, True, True]
    assert codes[4].abs().max() == 0


@pytest.mark.parametrize("size", [0, 64, 128])
@pytest.mark.parametrize("k", [1152, 3072, 5120])
def cuda_a_row_does_not_depend_on_its_batch(k: int, size: int, make_layer) -> None:
    x = make_layer(1029, k, 1, dtype=torch.bfloat16, device="cuda").x
    whole = act_quant(x, "gelu_tanh", None, None, size, "sylvester")
    for start, stop in ((0, 1), (5, 6), (3, 20), (1, 1029), (1028, 1029)):
        for got, want in zip(act_quant(x[start:stop], "gelu_tanh", None, None, size, "sylvester"), whole, strict=True):
            assert torch.equal(got, want[start:stop])
