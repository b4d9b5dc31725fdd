import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import int8_linear_low_rank as module
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank

from ._case import (
    DIT_XL,
    FLOATS,
    HOPPER,
    LINEAR,
    NVIDIA,
    POINTERS,
    RAGGED,
    TOKENS,
    Compile,
    assert_as_good_as,
    relative_rms,
    run_twin,
    twin,
)

OPS = {"int8_linear_low_rank": int8_linear_low_rank}


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    low, up = a.x[:, :4], a.x[0].view(8, 8)[:, :4]
    owner = torch.tensor([0, 0, 2, 2], dtype=torch.uint8)
    first = (a.codes, a.scale, a.weight, a.weight_scale)
    return {
        "int8_linear_low_rank": [
            (*first, a.bias, [low, up.half()], [], torch.bfloat16),
            (*first, None, [a.x[:, :12].bfloat16(), up, owner], [a.x[:, :8]], torch.float32),
            (*first, a.bias, [low, up], [a.x[:, :8].half(), a.x[:1, 8:16]], torch.float16),
        ]
    }


def compile_cases() -> Iterator[Compile]:
    file = twin("int8_linear_low_rank")
    bf16, fp32 = torch.bfloat16, torch.float32
    plain = {"HAS_BIAS": True, "HAS_OWNER": False, "HAS_RESIDUAL": False, "HAS_GATE": False}
    joined, gated = {**plain, "HAS_OWNER": True}, {**plain, "HAS_RESIDUAL": True, "HAS_GATE": True}
    both = {**joined, **gated, "HAS_OWNER": True}
    for m, tokens, rank, dtype, flags in (
        (17, 17, 32, bf16, plain), (512, 512, 16, bf16, joined), (8192, 8192, 32, bf16, plain),
        (8192, 256, 32, bf16, gated), (8192, 300, 32, bf16, gated), (8192, 8192, 128, bf16, joined),
        (8192, 8192, 32, fp32, plain),
        (512, 256, 32, fp32, both),
    ):  # fmt: skip
        types = {**LINEAR, "x_ptr": "*i8", "y_ptr": "*bf16", "R": "i32", "owner_ptr": "*u8", "residual_ptr": "*bf16"}
        types |= {"gate_ptr": "*bf16", "up_ptr": "*bf16", "low_ptr": POINTERS[dtype]}
        types |= dict.fromkeys(("UNIT", "LOW_STRIDE", "TOKENS", "GATE_STRIDE"), "i32")
        options, one_sample = file.launch_options(m, 4608, tokens, rank, dtype)
        constants = {"EVEN_K": True, "DOT": file.dot_dtype(dtype), "ONE_SAMPLE": one_sample, **flags}
        constants |= {**options, **file.ROUND_EACH_STEP}
        on = NVIDIA if flags is plain and m == 8192 and dtype == bf16 else HOPPER
        name = f"M={m} tokens={tokens} R={rank} {dtype} {'owner' * flags['HAS_OWNER']}"
        yield Compile(name, file.int8_linear_low_rank_kernel, types, constants, on)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "n", "rank"), [(1, 72, 33, 16), (17, 200, 40, 5), (129, 33, 130, 40)])
def interpreter_equals_reference(m: int, k: int, n: int, rank: int, dtype: torch.dtype, make_layer) -> None:
    a = make_layer(m, k, n)
    low, up = make_layer(m, 3 * rank, 1).x.to(dtype), make_layer(n, rank, 2).x.to(dtype)
    owner = torch.arange(n).mul(3).div(n, rounding_mode="floor").to(torch.uint8)
    residual, gate = make_layer(m, n, 3).x, make_layer(1, 2 * n, 4).x[:, n:].repeat(m, 1)
    for bias, branch, stream in (
        (a.bias, [low[:, rank : 2 * rank], up], []),
        (None, [low, up, owner], [residual]),
        (a.bias, [low, up, owner], [residual, gate[:1]]),
        (a.bias, [low[:, :rank], up], [residual, gate]),
    ):
        args = (a.codes, a.scale, a.weight, a.weight_scale, bias, branch, stream, torch.float32)
        assert relative_rms(run_twin("int8_linear_low_rank", *args), int8_linear_low_rank(*args)) < 1e-6


def _exact(codes: Any, scale: Any, weight: Any, weight_scale: Any, bias: Any, low: Any, up: Any) -> Any:
    """The layer in float64."""
    y = codes.double() @ weight.double().t() * scale.double()[:, None] * weight_scale.double()
    return y + low.double() @ up.double().t() + bias


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank", [16, 32, 128])
@pytest.mark.parametrize(("k", "n"), DIT_XL[:1] + RAGGED)
def cuda_equals_reference(k: int, n: int, rank: int, dtype: torch.dtype, make_layer) -> None:
    for m in TOKENS:
        a = make_layer(m, k, n, device="cuda")
        low, up = torch.randn(m, rank, device="cuda").to(dtype), torch.randn(n, rank, device="cuda").to(dtype)
        args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias)
        want = _exact(*args, low, up)
        for out in (torch.float32, torch.bfloat16):
            rest = ([low, up], [], out)
            assert_as_good_as(module._reference(*args, *rest), int8_linear_low_rank(*args, *rest), want)
            residual, gate = want.flip(0).to(out), torch.randn(m, 2 * n, device="cuda").to(out)[:1, n:]
            rest = ([low, up], [residual, gate], out)
            whole = residual.double() + gate.double() * want
            assert_as_good_as(module._reference(*args, *rest), int8_linear_low_rank(*args, *rest), whole)


@pytest.mark.parametrize("sizes", [(1152, 1152, 1152), (3072, 3072, 3072, 12288), (40, 72, 130)])
def cuda_joined_layers_equal_each_alone(sizes: tuple[int, ...], make_layer) -> None:
    """Bit by bit: what is beside a layer's own ranks is zero."""
    rank, n, ends = 32, sum(sizes), torch.tensor(sizes).cumsum(0)
    each = torch.tensor(sizes) // math.gcd(*sizes)
    owner = torch.arange(len(sizes), dtype=torch.uint8).repeat_interleave(each).cuda()
    for m in (1, 129, 4429):
        a = make_layer(m, 1152, n, dtype=torch.bfloat16, device="cuda")
        low = torch.randn(m, rank * len(sizes), device="cuda").bfloat16()
        up = torch.randn(n, rank, device="cuda").bfloat16()
        args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias)
        y = int8_linear_low_rank(*args, [low, up, owner], [], torch.bfloat16)
        assert relative_rms(y, module._reference(*args, [low, up, owner], [], torch.bfloat16)) < 4e-3
        for i, end in enumerate(ends.tolist()):
            rows = slice(end - sizes[i], end)
            part = (a.codes, a.scale, a.weight[rows], a.weight_scale[rows], a.bias[rows])
            branch = [low[:, i * rank : (i + 1) * rank], up[rows]]
            assert torch.equal(int8_linear_low_rank(*part, branch, [], torch.bfloat16), y[:, rows])


@pytest.mark.parametrize(("k", "n"), [(1152, 3456), (3072, 12288), (4608, 1152)])
def cuda_a_row_does_not_depend_on_its_batch(k: int, n: int, make_layer) -> None:
    a = make_layer(8192, k, n, dtype=torch.bfloat16, device="cuda")
    low, up = torch.randn(8192, 32, device="cuda").bfloat16(), torch.randn(n, 32, device="cuda").bfloat16()
    residual = torch.randn(8192, n, device="cuda").bfloat16()

    def run(rows: slice, stream: bool) -> Any:
        rest = (a.weight, a.weight_scale, a.bias, [low[rows], up])
        added = [residual[rows], residual[:1]] if stream else []
        return int8_linear_low_rank(a.codes[rows], a.scale[rows], *rest, added, torch.bfloat16)

    for stream in (False, True):
        whole = run(slice(None), stream)
        for rows in (slice(1), slice(5, 22), slice(3, 133), slice(1000, 3000)):
            assert torch.equal(run(rows, stream), whole[rows])
