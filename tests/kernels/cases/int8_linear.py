"""`int8_linear`, and `int8_weight_linear` whose kernels for many tokens are in the same file."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from vdit_quant.kernels import int8_linear as module
from vdit_quant.kernels import launch_table
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear

from ._case import (
    EVERYWHERE,
    FEW_TOKENS,
    FLOAT,
    FLOATS,
    HOPPER,
    INT8,
    LAYERS,
    LINEAR,
    POINTERS,
    SHAPES,
    TOKENS,
    TOLERANCE,
    TWO,
    Compile,
    assert_as_good_as,
    relative_rms,
    run_twin,
    twin,
)

OPS = {"int8_linear": int8_linear, "int8_weight_linear": int8_weight_linear}
LIMITS = [("int8_weight_linear", {"dtype": torch.float64}, "dtype torch.float64 is not supported")]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {
        "int8_linear": [
            (a.codes, a.scale, a.weight, a.weight_scale, a.bias, torch.float32),
            (a.codes, a.scale, a.weight, a.weight_scale, None, torch.bfloat16),
        ],
        "int8_weight_linear": [(a.x, a.weight, a.weight_scale, a.bias)],
    }


def compile_cases() -> Iterator[Compile]:
    file, few = twin("int8_linear"), twin("int8_weight_linear")
    for m, even in ((1, True), (17, True), (64, True), (512, True), (4096, True), (4096, False)):
        types = {**LINEAR, "x_ptr": "*i8", "y_ptr": "*bf16"}
        constants = {"HAS_BIAS": True, "EVEN_K": even, **file.int8_options(m, 3456), **file.ROUND_EACH_STEP}
        on, units = (EVERYWHERE if even else TWO, INT8) if m == 4096 else (HOPPER, {})
        yield Compile(f"M={m} even={even}", file.int8_linear_kernel, types, constants, on, units)
    bf16, fp32 = torch.bfloat16, torch.float32
    for m, dtype in ((1, bf16), (64, bf16), (4096, bf16), (4096, fp32)):
        types = {**LINEAR, "x_ptr": POINTERS[dtype], "y_ptr": POINTERS[dtype]}
        constants = {"HAS_BIAS": True, "EVEN_K": True, "DOT": file.dot_dtype(dtype)}
        constants |= file.weight_only_options(m, dtype)
        yield Compile(f"weight only M={m} {dtype}", file.int8_weight_linear_kernel, types, constants)
    for bm, n in ((16, 6912), (32, 6912), (32, 193536), (64, 6912)):
        types = {**LINEAR, "x_ptr": "*bf16", "y_ptr": "*bf16"}
        constants = {"HAS_BIAS": True, "EVEN_K": True, "BM": bm, "DOT": file.dot_dtype(bf16)}
        constants |= few.small_options(bm, n)
        on, units = EVERYWHERE if bm == 16 else HOPPER, FEW_TOKENS if constants["num_warps"] < 4 else FLOAT
        yield Compile(f"few tokens BM={bm} N={n}", few.small_weight_kernel, types, constants, on, units)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def interpreter_equals_reference(m: int, k: int, n: int, with_bias: bool, make_layer) -> None:
    a = make_layer(m, k, n)
    args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias if with_bias else None, torch.float32)
    assert torch.equal(run_twin("int8_linear", *args), int8_linear(*args))


def interpreter_large_tile(make_layer) -> None:
    a = make_layer(130, 260, 140)
    args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, torch.float32)
    with launch_table.forced("int8_linear", twin("int8_linear").int8_options(10**6, 10**6)):
        assert torch.equal(run_twin("int8_linear", *args), int8_linear(*args))


def interpreter_views_and_empty_batches(make_layer) -> None:
    a = make_layer(17, 72, 40)
    rest = (a.weight, a.weight_scale, None, torch.float32)
    args = (a.codes.t().contiguous().t(), a.scale, *rest)
    assert torch.equal(run_twin("int8_linear", *args), int8_linear(*args))
    assert run_twin("int8_linear", a.codes[:0], a.scale[:0], *rest).shape == (0, 40)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "n"), [*SHAPES, (40, 200, 70)])
def interpreter_weight_only(m: int, k: int, n: int, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(m, k, n, dtype=dtype)
    args = (a.x, a.weight, a.weight_scale, a.bias)
    got = run_twin("int8_weight_linear", *args)
    assert got.dtype == dtype
    assert relative_rms(got, int8_weight_linear(*args)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("m", "dtype"), [(64, torch.float16), (65, torch.float16), (65, torch.float32)])
def interpreter_what_was_measured_for_many_tokens_is_for_them(
    m: int, dtype: torch.dtype, make_layer, monkeypatch
) -> None:
    a, file = make_layer(m, 64, 40, dtype=dtype), twin("int8_weight_linear")
    asked = MagicMock(return_value=None)
    monkeypatch.setattr(launch_table, "lookup", asked)
    run_twin("int8_weight_linear", a.x, a.weight, a.weight_scale, a.bias)
    assert [call.kwargs for call in asked.call_args_list] == {64: [{}], 65: [file.MANY][: dtype != torch.float32]}[m]


@pytest.mark.parametrize(("m", "warps"), [(1, 2), (32, 2), (33, 4)])
def interpreter_few_tokens_do_not_take_the_warps_of_more(m: int, warps: int, make_layer, monkeypatch) -> None:
    """Programs of four warps sum in another order on Hopper: a token's values must not follow from its neighbours."""
    a, file, kernel = make_layer(m, 64, 40, dtype=torch.float16), twin("int8_weight_linear"), MagicMock()
    monkeypatch.setattr(file, "small_weight_kernel", kernel)
    with launch_table.forced("int8_weight_linear", file.small_tile(64, 128, 4, 4)):
        run_twin("int8_weight_linear", a.x, a.weight, a.weight_scale, a.bias)
    assert kernel[0].call_args.kwargs["num_warps"] == warps


@pytest.mark.parametrize(("k", "n"), LAYERS)
def cuda_equals_reference(k: int, n: int, make_layer) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, device="cuda")
        args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias)
        want = a.codes.double() @ a.weight.double().t() * a.scale.double()[:, None] * a.weight_scale.double() + a.bias
        for dtype in FLOATS:
            reference = module._reference(*args, dtype)
            got = int8_linear(*args, dtype)
            assert_as_good_as(reference, got, want)
            assert torch.equal(got, reference)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "n"), LAYERS)
def cuda_weight_only(k: int, n: int, dtype: torch.dtype, make_layer) -> None:
    for m in (*TOKENS, 32, 33):
        a = make_layer(m, k, n, dtype=dtype, device="cuda")
        args = (a.x, a.weight, a.weight_scale, a.bias)
        want = a.x.double() @ a.weight.double().t() * a.weight_scale.double() + a.bias
        assert_as_good_as(module._weight_only_reference(*args), int8_weight_linear(*args), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "n"), [(1152, 3456), (2240, 2240)])
def cuda_a_row_does_not_depend_on_its_batch(k: int, n: int, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(4429, k, n, device="cuda")
    weights = (a.weight, a.weight_scale, a.bias, dtype)
    alone = int8_linear(a.codes[:1], a.scale[:1], *weights)
    for batch in (2, 17, 33, 129, 1024, 4429):
        assert torch.equal(int8_linear(a.codes[:batch], a.scale[:batch], *weights)[:1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("k", "n"), LAYERS)
def cuda_few_float_rows_do_not_depend_on_their_batch(k: int, n: int, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(twin("int8_weight_linear").ALIKE, k, n, dtype=dtype, device="cuda")
    weights = (a.weight, a.weight_scale, a.bias)
    alone = int8_weight_linear(a.x[:1], *weights)
    for batch in (2, 16, 17, len(a.x)):
        assert torch.equal(int8_weight_linear(a.x[:batch], *weights)[:1], alone)


def cuda_reference_equals_the_one_on_cpu(make_layer) -> None:
    a = make_layer(129, 2240, 96)
    args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, torch.float32)
    on_gpu = module._reference(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in args))
    torch.testing.assert_close(on_gpu.cpu(), int8_linear(*args), rtol=1e-6, atol=1e-6)
