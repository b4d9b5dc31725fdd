"""`norm_down` and `act_down`."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels import low_rank_down as module
from vdit_quant.kernels.act_quant import ACTS, GATED
from vdit_quant.kernels.low_rank_down import act_down, norm_down
from vdit_quant.kernels.norm_quant import Norm

from ._case import (
    EVERYWHERE,
    FLOAT,
    FLOATS,
    NVIDIA,
    POINTERS,
    TOLERANCE,
    Compile,
    assert_as_good_as,
    relative_rms,
    run_twin,
    twin,
)

OPS = {"norm_down": norm_down, "act_down": act_down}


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    down = a.weight.float()
    mod = list(a.x[:1].repeat(1, 2).chunk(2, dim=1))
    return {
        "norm_down": [
            (a.x, [], [], None, down.bfloat16(), "rms", 1e-6),
            (a.x.bfloat16(), mod, [a.x[0], a.x[1]], a.x[2].abs(), down[:4], "layer", 1e-6),
        ],
        "act_down": [
            (a.x.half(), "gelu", None, down),
            (a.x[:, :32], "swiglu", a.x[0].abs(), down.bfloat16(), a.x[:, :48]),
        ],
    }


def compile_cases() -> Iterator[Compile]:
    file = twin("act_down")
    names = ("x", "shift", "mod_scale", "weight", "bias", "prefix")
    for rank, dtype in ((32, torch.bfloat16), (128, torch.bfloat16), (96, torch.float16), (32, torch.float32)):
        types = dict.fromkeys((f"{name}_ptr" for name in (*names, "low")), POINTERS[dtype])
        types |= {"moments_ptr": "*fp32", "pre_scale_ptr": "*fp32", "down_ptr": "*bf16"}
        types |= dict.fromkeys(
            (*(f"{name}_stride" for name in names), "M", "K", "CHUNK", "RANK", "TOKENS", "PREFIX"), "i32"
        )
        constants = {"HAS_PRE_SCALE": rank == 96, "EVEN_K": True, "DOT": file.dot_dtype(dtype)}
        constants |= {**file.launch_options(rank, dtype), **file.ROUND_EACH_STEP}
        on, units = (EVERYWHERE, FLOAT) if rank == 32 and dtype != torch.float32 else (("90",), {})
        for samples in (True, False) if rank == 128 else (True,):
            norm = {"LAYER": True, "HAS_MOD": True, "AFFINE": 2 if rank == 96 else 0, "ONE_SAMPLE": samples}
            name = f"R={rank} {dtype} one sample={samples}"
            yield Compile(name, file.norm_down_kernel, types, {**constants, **norm}, on, units)
        for act in ("none", "gelu_tanh", "geglu"):
            extra = {"ACT": act, "HAS_PREFIX": act == "gelu_tanh"}
            some = on if act != "geglu" else tuple(a for a in on if a in NVIDIA)  # AMD's compiler spills it
            for fast in (False, True) if dtype == torch.bfloat16 and act == "gelu_tanh" else (False,):
                name, where = f"{act} R={rank} {dtype} fast={fast}", tuple(a for a in some if a in NVIDIA or not fast)
                given = {**constants, **extra, "FAST": fast}
                yield Compile(name, file.act_down_kernel, types, given, where, units if where else {})
    types = {"x_ptr": "*bf16", "moments_ptr": "*fp32", "x_stride": "i32", "M": "i32", "K": "i32", "eps": "fp32"}
    moments = importlib.import_module("vdit_quant.kernels._triton.row_moments")
    for k in (1152, 3072):
        given = {"LAYER": True, "EVEN_K": k % 2048 == 0, **moments.moments_options(k), **file.ROUND_EACH_STEP}
        yield Compile(f"moments K={k}", moments.moments_kernel, types, given, EVERYWHERE)
    types = {"parts_ptr": "*fp32", "low_ptr": "*bf16", "SIZE": "i32"}
    yield Compile("sum of parts", file.add_parts_kernel, types, {"PARTS": 4, "BLOCK": 1024, "num_warps": 4}, EVERYWHERE)


def _close(got: Tensor, want: Tensor) -> bool:
    return got.dtype == want.dtype and relative_rms(got, want) < TOLERANCE[want.dtype]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "rank"), [(4, 72, 5), (66, 192, 40)])
def interpreter_norm_equals_reference(m: int, k: int, rank: int, dtype: torch.dtype, make_layer) -> None:
    a, b, down = make_layer(m, k, 1, dtype=dtype), make_layer(2, 3 * k, 1).x, make_layer(rank, k, 2).x.bfloat16()
    for kind, mod, affine, pre_scale in (
        ("rms", [], [], None),
        ("layer", [b[:, :k], b[:, 2 * k :]], [a.x[0], a.x[1]], a.x[2].float().abs()),
        ("layer", [b[:1, :k], b[1:, 2 * k :]], [a.x[0]], None),
    ):
        got = run_twin("norm_down", a.x + 1, Norm(mod, affine, kind, 1e-6), pre_scale, down)
        assert _close(got, norm_down(a.x + 1, mod, affine, pre_scale, down, kind, 1e-6))


@pytest.mark.parametrize("act", ACTS)
def interpreter_act_equals_reference(act: str, make_layer) -> None:
    x, prefix, down = make_layer(5, 144, 1).x, make_layer(5, 40, 2).x, make_layer(20, 184, 1).x
    wide = x.repeat(1, 2) if act in GATED else x
    for columns, pre_scale in ((None, None), (prefix, down[0].abs())):
        part = down if columns is not None else down[:, 40:]
        assert _close(
            run_twin("act_down", wide, act, pre_scale, part, columns), act_down(wide, act, pre_scale, part, columns)
        )


def interpreter_parts_of_a_sum_are_added(make_layer) -> None:
    k, file = 2440, twin("act_down")
    assert file.split(k, 32, file.ACT_COLUMNS)[0] == 2
    assert file.split(k, 32, file.NORM_COLUMNS)[0] == 6
    x, down, b = make_layer(3, k, 1).x, make_layer(20, k, 2).x, make_layer(1, 2 * k, 3).x
    mod = list(b.chunk(2, dim=1))
    got = run_twin("norm_down", x, Norm(mod, [], "layer", 1e-6), None, down)
    assert _close(got, norm_down(x, mod, [], None, down, "layer", 1e-6))
    for width in (0, 40, 1290):  # a prefix that ends in the first part, and in the second
        wide, prefix = x[:, width:], x[:, :width] if width else None
        got = run_twin("act_down", wide, "gelu_tanh", b[0, :k].abs(), down, prefix)
        assert _close(got, act_down(wide, "gelu_tanh", b[0, :k].abs(), down, prefix))


def interpreter_empty_batches() -> None:
    x, down = torch.ones(0, 64), torch.ones(8, 64)
    assert run_twin("act_down", x, "none", None, down).shape == (0, 8)
    assert run_twin("norm_down", x, Norm([], [], "rms", 1e-6), None, down).shape == (0, 8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "rank"), [(1152, 96), (3072, 128), (15360, 32), (72, 20), (2240, 144)])
def cuda_equals_reference(k: int, rank: int, dtype: torch.dtype, make_layer) -> None:
    b, down = make_layer(3, 6 * k, 1, dtype=dtype, device="cuda").x, make_layer(rank, k, 1, device="cuda").x.bfloat16()
    mod = [b[:, k : 2 * k], b[:, 3 * k : 4 * k]]
    for m in (3, 51, 1023):
        x = make_layer(m, k, 1, dtype=dtype, device="cuda").x
        scale = x[0].float().abs() + 0.1
        for shift_scale, affine, kind, pre_scale in (([], [x[1]], "rms", scale), (mod, [], "layer", None)):
            norm = Norm(shift_scale, affine, kind, 1e-6)
            wide = norm.apply(x.double().float()).double() * (1.0 if pre_scale is None else pre_scale.double())
            want = wide @ down.to(dtype).double().t()
            reference = module._norm_reference(x, norm, pre_scale, down)
            got = norm_down(x, shift_scale, affine, pre_scale, down, kind, 1e-6)
            assert_as_good_as(reference, got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ACTS)
def cuda_act_equals_reference(act: str, dtype: torch.dtype, make_layer) -> None:
    x = make_layer(1023, 4608, 1, dtype=dtype, device="cuda").x
    prefix, down = x[:, :1152], make_layer(32, 5760, 1, device="cuda").x.bfloat16()
    wide = torch.cat([x, x.flip(1)], dim=1) if act in GATED else x
    for columns, part in ((None, down[:, 1152:].contiguous()), (prefix, down)):
        scale = part[0].float().abs() + 0.1
        full = module.activated(wide.double(), act)
        full = full if columns is None else torch.cat([columns.double(), full], dim=1)
        want = (full * scale.double()) @ part.to(dtype).double().t()
        reference = module._act_reference(wide, act, scale, part, columns)
        assert_as_good_as(reference, act_down(wide, act, scale, part, columns), want)


@pytest.mark.parametrize("rank", [32, 96])
def cuda_a_row_does_not_depend_on_its_batch(rank: int, make_layer) -> None:
    x = make_layer(2058, 1152, 1, dtype=torch.bfloat16, device="cuda").x
    mod, down = [x[:1], x[1:2]], make_layer(rank, 1152, 1, device="cuda").x.bfloat16()
    two = [t.repeat(2, 1) for t in mod]
    whole = norm_down(x, mod, [], None, down, "layer", 1e-6)
    assert torch.equal(norm_down(x, two, [], None, down, "layer", 1e-6), whole)
    acted = act_down(x, "gelu_tanh", None, down)
    wide = torch.cat([x, x[:, :8]], dim=1)[:, :1152]  # rows that do not begin every 16 elements
    for start, stop in ((0, 1), (5, 6), (3, 20), (1, 2058), (2057, 2058)):
        assert torch.equal(norm_down(x[start:stop], mod, [], None, down, "layer", 1e-6), whole[start:stop])
        assert torch.equal(norm_down(wide[start:stop], mod, [], None, down, "layer", 1e-6), whole[start:stop])
        assert torch.equal(act_down(x[start:stop], "gelu_tanh", None, down), acted[start:stop])
