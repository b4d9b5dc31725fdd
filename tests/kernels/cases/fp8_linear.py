"""`quant_token_fp8` and `fp8_linear`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import dispatch, scaled_mm
from vdit_quant.kernels import fp8_linear as module
from vdit_quant.kernels.fp8_linear import fp8_linear, quant_token_fp8

from ._case import (
    E4M3,
    FLOATS,
    FP8,
    LAYERS,
    LINEAR,
    ROWS,
    SHAPES,
    SIZES,
    TOKENS,
    TOLERANCE,
    WITH_FP8,
    Compile,
    needs_fp8,
    relative_rms,
    run_twin,
    twin,
)

OPS = {"quant_token_fp8": quant_token_fp8, "fp8_linear": fp8_linear}


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    x, weight = a.x.to(E4M3), a.weight.to(E4M3)
    return {
        "quant_token_fp8": [(a.x,), (a.x.bfloat16(),)],
        "fp8_linear": [
            (x, a.scale, weight, a.weight_scale, a.bias, torch.float32),
            (x, a.scale, weight, a.weight_scale, None, torch.bfloat16),
        ],
    }


def compile_cases() -> Iterator[Compile]:
    file = twin("fp8_linear")
    rounding = file.ROUND_EACH_STEP
    for k in (1152, 15360):
        types = {"x_ptr": "*bf16", "codes_ptr": "*fp8e4nv", "scale_ptr": "*fp32", **SIZES}
        constants = {"TINY": 1e-30, "INTERPRET": False, **twin("quant_token").launch_options(k), **rounding}
        yield Compile(f"quantise K={k}", file.quant_token_fp8_kernel, types, constants, WITH_FP8)
    for m in (1, 64, 512, 4096):
        types = {**LINEAR, "x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "y_ptr": "*bf16"}
        constants = {"HAS_BIAS": True, "EVEN_K": True, **file.fp8_options(m, 3456), **rounding}
        yield Compile(f"M={m}", file.fp8_linear_kernel, types, constants, WITH_FP8, FP8 if m == 4096 else {})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (17, 72), (129, 200)])
def interpreter_quantises_as_the_reference(m: int, k: int, dtype: torch.dtype, make_layer) -> None:
    x = make_layer(m, k, 4).x.to(dtype)
    x[-1] = 0
    x[m // 2, k // 2] = 1000
    (codes, scale), (want, want_scale) = run_twin("quant_token_fp8", x), quant_token_fp8(x)
    assert torch.equal(codes.float(), want.float())
    assert torch.equal(scale, want_scale)


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def interpreter_multiplies_as_the_reference(m: int, k: int, n: int, make_layer) -> None:
    a = make_layer(m, k, n)
    for bias, out_dtype in ((a.bias, torch.float32), (None, torch.float16)):
        args = (a.x.to(E4M3), a.scale, a.weight.to(E4M3), a.weight_scale, bias, out_dtype)
        assert relative_rms(run_twin("fp8_linear", *args), fp8_linear(*args)) < TOLERANCE[out_dtype]


@needs_fp8
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", ROWS)
def cuda_quantises_as_the_reference(k: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        x = make_layer(m, k, 1, dtype=dtype, device="cuda").x
        x[-1] = 0
        (codes, scale), (want, want_scale) = quant_token_fp8(x), module._quant_reference(x)
        assert torch.equal(codes.view(torch.int8), want.view(torch.int8))
        assert torch.equal(scale, want_scale)


@needs_fp8
@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize(("k", "n"), LAYERS)
def cuda_multiplies_as_the_reference(k: int, n: int, mode: str, make_layer) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, device="cuda")
        codes, scale = module._quant_reference(a.x)
        weight, weight_scale = module._quant_reference(a.weight.float())
        for dtype in FLOATS:
            args = (codes, scale, weight, weight_scale, a.bias, dtype)
            want = module._reference(*args[:-1], torch.float32)
            with dispatch.use(mode=mode):
                got = fp8_linear(*args)
            assert got.dtype == dtype
            # Hopper adds up e4m3 products, 32 at a time, with about 13 bits of mantissa: as many errors as steps.
            assert relative_rms(got, want) < 2**-12 * (k / 32) ** 0.5 + torch.finfo(dtype).eps


@needs_fp8
def cuda_runs_through_cublaslt_where_it_can() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := scaled_mm._device_reason(device)) is not None:
        pytest.skip(reason)
    facts = {"k": 1152, "n": 3456, "out_dtype": torch.bfloat16}
    assert dispatch.explain("fp8_linear", "cuda", **facts).backend == "cublaslt"
    assert dispatch.explain("fp8_linear", "cuda", **facts | {"n": 40}).backend == "triton"
    assert dispatch.explain("fp8_linear", "cuda", **facts | {"out_dtype": torch.float32}).backend == "triton"
