from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels import block_fp4_linear as module
from vdit_quant.kernels import dispatch
from vdit_quant.kernels.block_fp4_linear import block_fp4_linear
from vdit_quant.kernels.block_scales import decode_blocks
from vdit_quant.kernels.quant_token_block_fp4 import quant_token_block_fp4

from ._case import (
    DIT_XL,
    EVERYWHERE,
    FEW_TOKENS,
    FLOAT,
    FLOATS,
    FLUX,
    FP4,
    LINEAR,
    TOKENS,
    TWO,
    Compile,
    relative_rms,
    run_twin,
    twin,
)

OP = "block_fp4_linear"
OPS = {OP: block_fp4_linear}
LIMITS = [
    (OP, {"dtype": torch.float64}, "dtype torch.float64 is not supported"),
    (OP, {"group": 64}, "blocks of 64 are not supported"),
    (OP, {"group": 16}, None),
]
SMALL = [(1, 96, 33), (17, 416, 40), (65, 224, 136), (129, 320, 130)]
both = pytest.mark.parametrize("group", [32, 16])


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {OP: [(*_layer(3, 64, 8, 32), a.bias, torch.float32), (*_layer(3, 64, 8, 16), None, torch.bfloat16)]}


def compile_cases() -> Iterator[Compile]:
    file = twin(OP)
    pointers = ("x_ptr", "x_block_ptr", "w_ptr", "w_block_ptr")
    types = {**LINEAR, **dict.fromkeys(pointers, "*u8"), "y_ptr": "*bf16"}

    def case(name: str, m: int, native: bool, group: int, even: bool = True, **expected: Any) -> Compile:
        constants = {"HAS_BIAS": True, "EVEN_K": even, "NATIVE": native, "GROUP": group}
        constants |= {"DOT": file.dot_dtype(torch.bfloat16), **file.ROUND_EACH_STEP}
        constants |= (file.native_options if native else file.decoded_options)(m, 3456)
        return Compile(f"{name} group={group}", file.block_fp4_linear_kernel, types, constants, **expected)

    yield case("decoded", 4096, False, 16, on=EVERYWHERE, units=FLOAT)
    yield case("decoded", 4096, False, 32, on=TWO, units=FLOAT)
    yield case("decoded, M=1", 1, False, 16, on=TWO, units=FEW_TOKENS)
    yield case("decoded, M=64", 64, False, 32, on=TWO, units=FLOAT)
    yield case("decoded, M=512", 512, False, 16, even=False, on=TWO, units=FLOAT)
    nvf4 = "kind::mxf4nvf4.block_scale.scale_vec::"
    scales = {16: {"100": nvf4 + "4X", "120": nvf4 + "4X"}, 32: {"100": "kind::mxf4.block_scale", "120": nvf4 + "2X"}}
    for group, ptx in scales.items():
        for m, even in ((64, False), (4096, True)):
            yield case(f"native, M={m}", m, True, group, even, on=("100", "120"), units=FP4, ptx=ptx)


def _layer(m: int, k: int, n: int, group: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Operands of which every order of the sum is exact: block scales from 0.5 to 2, or from 0.75 to 1.5."""
    g = torch.Generator(device).manual_seed(m * 7919 + k * 31 + n)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g, dtype=torch.int32, device=device).to(torch.uint8)

    scales = (126, 128) if group == 32 else (52, 60)
    found = []
    for rows in (m, n):
        scale = torch.rand(rows, generator=g, device=device) + 0.1
        found += [draw(0, 255, rows, k // 2), draw(*scales, rows, k // group), scale]
    return tuple(found)


def _bias(n: int, device: str = "cpu") -> Tensor:
    return torch.linspace(-1, 1, n, device=device)


def _every_code_with_block_scales(group: int, device: str = "cpu") -> tuple[tuple[Tensor, ...], Tensor]:
    """Operands whose product is every code times every block scale that a product with 1 can hold, and that product."""
    bits = torch.arange(8, 250) if group == 32 else torch.arange(1, 127)
    code = torch.arange(16, dtype=torch.int32)[:, None].to(torch.uint8)
    x = (code | code << 4).expand(-1, len(bits) * group // 2).contiguous()
    x_bits = bits.to(torch.uint8).expand(16, -1).contiguous()
    at = torch.arange(len(bits)) * group + torch.arange(len(bits)) % group  # one element of each block, another each
    weight = torch.zeros(len(bits), len(bits) * group // 2, dtype=torch.uint8)
    weight[torch.arange(len(bits)), at // 2] = (2 << 4 * (at % 2)).to(torch.uint8)  # code 2: 1.0
    ones = torch.full((len(bits), len(bits)), 127 if group == 32 else 56, dtype=torch.uint8)
    args = (x, x_bits, torch.ones(16), weight, ones, torch.ones(len(bits)))
    return tuple(t.to(device) for t in args), decode_blocks(x, x_bits)[:, at].to(device)


@both
@pytest.mark.parametrize(("m", "k", "n"), SMALL)
def interpreter_equals_reference(m: int, k: int, n: int, group: int) -> None:
    for bias, dtype in ((_bias(n), torch.float32), (None, torch.float16)):
        args = (*_layer(m, k, n, group), bias, dtype)
        assert torch.equal(run_twin(OP, *args), block_fp4_linear(*args))


@both
def interpreter_quantised_activations(group: int, make_layer) -> None:
    x = make_layer(33, 192, 4).x
    args = (*quant_token_block_fp4(x, group), *_layer(1, 192, 40, group)[3:], None, torch.float32)
    assert relative_rms(run_twin(OP, *args), block_fp4_linear(*args)) < 1e-6


@both
def interpreter_every_code_with_every_block_scale(group: int) -> None:
    args, want = _every_code_with_block_scales(group)
    assert torch.equal(run_twin(OP, *args, None, torch.float32), want)
    assert torch.equal(block_fp4_linear(*args, None, torch.float32), want)


def interpreter_the_block_scale_that_is_no_number() -> None:
    x, bits, *rest = _layer(3, 64, 8, 32)
    bits[1, 0] = 255
    args = (x, bits, *rest, None, torch.float32)
    want, got = block_fp4_linear(*args), run_twin(OP, *args)
    assert want.isnan().any(1).tolist() == [False, True, False]
    assert torch.equal(got.isnan(), want.isnan())


def interpreter_views_and_empty_batches() -> None:
    x, bits, scale, *weight = _layer(17, 96, 40, 32)
    args = (x.t().contiguous().t(), bits.t().contiguous().t(), scale, *weight, None, torch.float32)
    assert torch.equal(run_twin(OP, *args), block_fp4_linear(*args))
    assert run_twin(OP, x[:0], bits[:0], scale[:0], *weight, None, torch.float32).shape == (0, 40)


@both
@pytest.mark.parametrize(("k", "n"), [*DIT_XL, *FLUX, (2240, 2240), (96, 40), (224, 130)])
def cuda_equals_reference_where_sums_are_exact(k: int, n: int, group: int) -> None:
    for m in TOKENS:
        args = (*_layer(m, k, n, group, "cuda"), _bias(n, "cuda"))
        for dtype in FLOATS:
            assert torch.equal(block_fp4_linear(*args, dtype), module._reference(*args, dtype))


@both
@pytest.mark.parametrize(("k", "n"), [(1152, 3456), (4608, 1152), (15360, 3072)])
def cuda_is_as_good_as_bfloat16(k: int, n: int, group: int, make_layer) -> None:
    """Twice the error of a product of the same operands in bfloat16, and of fp32 what tensor cores keep of it."""
    weight = quant_token_block_fp4(make_layer(n, k, 1, device="cuda").x, group)
    for m in TOKENS:
        rows = quant_token_block_fp4(make_layer(m, k, 2, device="cuda").x, group)
        x, w = (decode_blocks(*t[:2]) * t[2][:, None] for t in (rows, weight))
        want = x.double() @ w.double().t()
        own = relative_rms(x.bfloat16() @ w.bfloat16().t(), want)
        assert relative_rms(block_fp4_linear(*rows, *weight, None, torch.bfloat16), want) < 2 * own
        # Tensor cores cut off, sixteen products at a time, what is below the last bit of the sum.
        assert relative_rms(block_fp4_linear(*rows, *weight, None, torch.float32), want) < 5e-6 + k / 16 * 2**-24


@both
def cuda_every_code_with_every_block_scale(group: int) -> None:
    args, want = _every_code_with_block_scales(group, "cuda")
    for repeat in (1, 8):  # few tokens, and the tiles of many
        rows = (torch.cat([t] * repeat) for t in args[:3])
        got = block_fp4_linear(*rows, *args[3:], None, torch.float32)
        assert torch.equal(got, want.repeat(repeat, 1))


@both
def cuda_the_native_form_on_any_gpu_that_has_it_or_imitates_it(group: int) -> None:
    """For Hopper, blocks of 32 are imitated in bfloat16: that shows that operands and scales are where they belong."""
    device = torch.device("cuda", torch.cuda.current_device())
    file = twin(OP)
    if file.native_limits(device, group) is not None and (group == 16 or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip(f"no form of {file.note(OP, device, group)}")
    for m, k, n in ((1, 96, 33), (200, 416, 136), (512, 1152, 3456)):
        operands, rest = _layer(m, k, n, group, "cuda"), (_bias(n, "cuda"), torch.float32)
        assert torch.equal(file.multiply(True, operands, *rest), module._reference(*operands, *rest))


def cuda_says_which_form_runs() -> None:
    found = dispatch.explain(OP, "cuda", group=32)
    assert (found.backend, found.reason) == ("triton", "supported")
    native = torch.cuda.get_device_capability() in twin(OP).NATIVE
    assert native or "this GPU has" in str(found.note)
