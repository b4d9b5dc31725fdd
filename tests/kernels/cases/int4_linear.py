"""`int4_to_int8` and the two products with int4 weights."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from vdit_quant.kernels import int4_linear as module
from vdit_quant.kernels import launch_table
from vdit_quant.kernels.int4_linear import int4_linear, int4_to_int8, int4_weight_linear
from vdit_quant.kernels.int8_linear import int8_linear

from ._case import (
    EVERYWHERE,
    FEW_TOKENS,
    FLOAT,
    FLOATS,
    GROUPED,
    GROUPED_LAYERS,
    HOPPER,
    INT8,
    LINEAR,
    POINTERS,
    SHAPES,
    SIZES,
    TOKENS,
    TOLERANCE,
    Compile,
    assert_as_good_as,
    relative_rms,
    run_twin,
    twin,
)

OPS = {"int4_to_int8": int4_to_int8, "int4_linear": int4_linear, "int4_weight_linear": int4_weight_linear}
LIMITS = [
    ("int4_linear", {"group": 48}, "groups of 48 are not supported"),
    ("int4_to_int8", {"group": 48}, "groups of 48 are not supported"),
    ("int4_weight_linear", {"dtype": torch.float64}, "dtype torch.float64 is not supported"),
]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {
        "int4_to_int8": [(a.packed, a.group_scale, 64), (a.packed, None, 64)],
        "int4_linear": [(a.codes, a.scale, a.packed, a.weight_scale, a.group_scale, a.bias, torch.bfloat16)],
        "int4_weight_linear": [(a.x, a.packed, a.weight_scale, a.group_scale, None)],
    }


def compile_cases() -> Iterator[Compile]:
    decode, file = twin("int4_to_int8"), twin("int4_linear")
    types = {"w_ptr": "*u8", "group_ptr": "*u8", "out_ptr": "*i8", "WORDS": "i32", **SIZES}
    for group in (0, 32):
        constants = {"GROUP": group, **decode.bytes_options(1152)}
        on = EVERYWHERE if group else HOPPER
        yield Compile(f"by bytes group={group}", decode.int4_bytes_kernel, types, constants, on)
        constants = {"GROUP": group, **decode.words_options(1 << 20)}
        yield Compile(f"by words group={group}", decode.int4_words_kernel, types, constants, EVERYWHERE)
    i8, bf16 = torch.int8, torch.bfloat16
    for m, dtype, group in ((1, i8, 64), (64, i8, 0), (64, i8, 128), (1, bf16, 16), (64, bf16, 64)):
        types = {**LINEAR, "w_ptr": "*u8", "group_ptr": "*u8", "x_ptr": POINTERS[dtype], "y_ptr": "*bf16"}
        dot = file.tl.int8 if dtype == i8 else file.dot_dtype(dtype)
        constants = {"HAS_BIAS": True, "EVEN_K": True, "INT8": dtype == i8, "DOT": dot, "GROUP": group}
        constants |= file.fused_options(m) | (file.ROUND_EACH_STEP if dtype == i8 else {})
        on, units = (EVERYWHERE, INT8) if (m, group) == (64, 128) else (HOPPER, {})
        yield Compile(f"M={m} {dtype} group={group}", file.int4_linear_kernel, types, constants, on, units)
    file = twin("int4_weight_linear")
    types = {**LINEAR, "w_ptr": "*u8", "group_ptr": "*u8", "x_ptr": "*bf16", "y_ptr": "*bf16"}
    for m, n, group in ((1, 6912, 64), (2, 193536, 64), (64, 6912, 64), (16, 6912, 32), (1, 6912, 0)):
        options, units = file.small_int4_options(m, n, 1152, group), FEW_TOKENS if m <= file.ALIKE else FLOAT
        constants = {"HAS_BIAS": True, "GROUP": group, "DOT": file.dot_dtype(bf16), "BM": max(16, m), **options}
        on = EVERYWHERE if m == 1 else HOPPER  # codes become floats by PTX, where that is
        yield Compile(f"few: M={m} N={n} group={group}", file.small_int4_kernel, types, constants, on, units)


@pytest.mark.parametrize(("m", "k", "n", "group"), [(*shape, None) for shape in SHAPES] + GROUPED)
def interpreter_equals_reference(m: int, k: int, n: int, group: int | None, make_layer) -> None:
    a = make_layer(m, k, n, group)
    args = (a.packed, a.group_scale, k)
    assert torch.equal(run_twin("int4_to_int8", *args), int4_to_int8(*args))
    args = (a.codes, a.scale, a.packed, a.weight_scale, a.group_scale, a.bias, torch.float32)
    assert torch.equal(run_twin("int4_linear", *args), int4_linear(*args))
    for dtype in FLOATS:
        args = (a.x.to(dtype), a.packed, a.weight_scale, a.group_scale, a.bias)
        got = run_twin("int4_weight_linear", *args)
        assert relative_rms(got, int4_weight_linear(*args)) < TOLERANCE[dtype]


def _every_code_with_every_group_scale(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """A packed weight [256, 8192], a row for each pair of codes, and the scales of its groups, all 256 in each row."""
    row = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)
    return row[:, None].expand(-1, 4096).contiguous(), row.expand(256, -1).contiguous()


def interpreter_every_code_with_every_group_scale() -> None:
    args = (*_every_code_with_every_group_scale(), 8192)
    assert torch.equal(run_twin("int4_to_int8", *args), int4_to_int8(*args))


def interpreter_measured_options_change_no_result(make_layer) -> None:
    a = make_layer(17, 192, 40, 64, dtype=torch.float16)
    args = (a.codes, a.scale, a.packed, a.weight_scale, a.group_scale, a.bias, torch.float32)
    for options in twin("int4_linear").candidates("int4_linear", 24, 40, 192)[::4]:
        with launch_table.forced("int4_linear", options):
            assert torch.equal(run_twin("int4_linear", *args), int4_linear(*args))
    args = (a.x, a.packed, a.weight_scale, a.group_scale, a.bias)
    want = run_twin("int4_weight_linear", *args)
    for options in twin("int4_weight_linear").candidates("int4_weight_linear", 24, 40, 192)[::3]:
        with launch_table.forced("int4_weight_linear", options):
            assert torch.equal(run_twin("int4_weight_linear", *args), want)


@pytest.mark.parametrize(("m", "warps"), [(1, 2), (32, 2), (33, 4)])
def interpreter_few_tokens_do_not_take_the_warps_of_more(m: int, warps: int, make_layer, monkeypatch) -> None:
    """As for int8 weights."""
    a, file, kernel = make_layer(m, 128, 40, 64, dtype=torch.float16), twin("int4_weight_linear"), MagicMock()
    monkeypatch.setattr(file, "small_int4_kernel", kernel)
    with launch_table.forced("int4_weight_linear", {"UNROLL": 1, "BN": 64, "num_warps": 4, "num_stages": 3}):
        run_twin("int4_weight_linear", a.x, a.packed, a.weight_scale, a.group_scale, a.bias)
    options = kernel[0].call_args.kwargs
    assert (options["num_warps"], options["STEP"]) == (warps, 64)


def interpreter_empty_batches(make_layer) -> None:
    a = make_layer(1, 64, 8, 32)
    rest = (a.packed, a.weight_scale, a.group_scale, None, torch.float32)
    assert run_twin("int4_linear", a.codes[:0], a.scale[:0], *rest).shape == (0, 8)
    assert run_twin("int4_to_int8", a.packed[:0], a.group_scale[:0], 64).shape == (0, 64)


def interpreter_words_a_program() -> None:
    """Less than 6 million codes leave part of the GPU idle with the blocks of more."""
    options = twin("int4_to_int8").words_options
    blocks = {n * k: options(n * k // 8)["BLOCK"] for n, k in ((1152, 1152), (4608, 1152), (6912, 1152), (12288, 3072))}
    assert list(blocks.values()) == [512, 512, 1024, 1024]


@pytest.mark.parametrize(("k", "n", "group"), GROUPED_LAYERS)
def cuda_equals_reference(k: int, n: int, group: int | None, make_layer) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, group, dtype=torch.bfloat16, device="cuda")
        decoded = int4_to_int8(a.packed, a.group_scale, k)
        assert torch.equal(decoded, module._decode_reference(a.packed, a.group_scale, k))
        for dtype in FLOATS:
            got = int4_linear(a.codes, a.scale, a.packed, a.weight_scale, a.group_scale, a.bias, dtype)
            assert torch.equal(got, int8_linear(a.codes, a.scale, decoded, a.weight_scale, a.bias, dtype))
            x = a.x.to(dtype)
            args = (x, a.packed, a.weight_scale, a.group_scale, a.bias)
            want = x.double() @ decoded.double().t() * a.weight_scale.double() + a.bias
            assert_as_good_as(module._weight_only_reference(*args), int4_weight_linear(*args), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grouped", [False, True])
def cuda_few_tokens_meet_every_code_with_every_group_scale(grouped: bool, dtype: torch.dtype) -> None:
    packed, every = _every_code_with_every_group_scale("cuda")
    group_scale = every if grouped else None
    decoded = module._decode_reference(packed, group_scale, 8192).to(dtype)
    ones = torch.ones(256, device="cuda")
    first_of_groups = torch.arange(0, 8192, 32, device="cuda")
    for channels in (first_of_groups[:, None] + torch.arange(8, device="cuda")).view(-1, 16):  # every place in a word
        x = torch.zeros(16, 8192, dtype=dtype, device="cuda")
        x[torch.arange(16, device="cuda"), channels] = 1
        assert torch.equal(int4_weight_linear(x, packed, ones, group_scale, None), decoded[:, channels].T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "n", "group"), [(1152, 3456, None), (1152, 3456, 64), (2240, 2240, 32)])
def cuda_a_row_does_not_depend_on_its_batch(k: int, n: int, group: int | None, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(4429, k, n, group, device="cuda")
    weights = (a.packed, a.weight_scale, a.group_scale, a.bias, dtype)
    alone = int4_linear(a.codes[:1], a.scale[:1], *weights)
    for batch in (2, 17, 33, 129, 1024, 4429):
        assert torch.equal(int4_linear(a.codes[:batch], a.scale[:batch], *weights)[:1], alone)
