import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels import attention as module
from vdit_quant.kernels import sdpa
from vdit_quant.kernels.attention import attend

from ._case import EVERYWHERE, FLOAT, FLOATS, TOLERANCE, Compile, assert_as_good_as, relative_rms, run_twin, twin

OPS = {"attention": attend}
LIMITS = [
    ("attention", {"head_dim": 72, "dtype": torch.bfloat16}, None),
    ("attention", {"head_dim": 192}, "heads have 192 channels, not a multiple of 8 from 16 to 128"),
    ("attention", {"head_dim": 36}, "heads have 36 channels, not a multiple of 8 from 16 to 128"),
]
HEADS = (16, 40, 64, 72, 96, 120, 128)
"""Channels of a head: powers of two, and those of every kind of second tile."""


def _heads(b: int, t: int, s: int, h: int, d: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k and v; the last two are parts of one tensor, as a merged projection makes them."""
    g = torch.Generator(device).manual_seed(0)
    q = torch.randn(b, t, h, d, generator=g, device=device).to(dtype)
    k, v = torch.randn(b, s, 2 * h * d, generator=g, device=device).to(dtype).chunk(2, 2)
    return q, k.unflatten(2, (h, d)), v.unflatten(2, (h, d))


def _key_mask(b: int, s: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Half of the keys are masked, as PixArt's padding is."""
    hidden = (torch.arange(s, device=device) * 7 + torch.arange(b, device=device)[:, None]) % 2
    return (hidden * -10000.0).to(dtype)[:, None, None]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    q, k, v = _heads(2, 5, 9, 3, 24, torch.float32)
    return {
        "attention": [
            (q, k, v, None),
            (q.bfloat16(), k.bfloat16(), v.bfloat16(), _key_mask(2, 9, torch.bfloat16)),
            (q, k, v, torch.zeros(1, 3, 5, 9)),
        ]
    }


def compile_cases() -> Iterator[Compile]:
    file = twin("attention")
    types = {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "mask_ptr", "o_ptr"), "*bf16"), "scale": "fp32"}
    strides = ("q_b", "q_t", "q_h", "k_b", "k_s", "k_h", "v_b", "v_s", "v_h", "mask_b", "mask_s", "T", "S", "HEADS")
    types |= dict.fromkeys(strides, "i32")
    for d in (64, 72, 128):
        constants = {"D": d, "HAS_MASK": d == 72, "ALIGN": 8, **file.launch_options(d, torch.bfloat16)}
        yield Compile(f"d={d}", file.attention_kernel, types, constants, EVERYWHERE, FLOAT)


@pytest.mark.parametrize(
    ("d", "dtype"), [*((d, torch.float32) for d in HEADS), (72, torch.float16), (72, torch.bfloat16)]
)
def interpreter_equals_reference(d: int, dtype: torch.dtype) -> None:
    q, k, v = _heads(2, 37, 70, 2, d, dtype)
    for mask in (None, _key_mask(2, 70, dtype), _key_mask(1, 70, torch.float32)):
        got, want = run_twin("attention", q, k, v, mask), attend(q, k, v, mask)
        assert got.dtype == dtype
        assert relative_rms(got, want) < TOLERANCE[dtype]


def interpreter_takes_rows_that_start_anywhere() -> None:
    q, k, v = (x[..., 1:25] for x in _heads(2, 9, 20, 3, 33, torch.float32))
    assert relative_rms(run_twin("attention", q, k, v, None), attend(q, k, v, None)) < TOLERANCE[torch.float32]


def interpreter_survives_scores_of_any_size() -> None:
    """A softmax that is one key, and keys masked with minus infinity."""
    q, k, v = _heads(1, 40, 70, 2, 16, torch.float32)
    mask = _key_mask(1, 70, torch.float32).masked_fill(_key_mask(1, 70, torch.float32) < 0, -math.inf)
    got, want = run_twin("attention", 1000 * q, 10 * k, v, mask), attend(1000 * q, 10 * k, v, mask)
    assert relative_rms(got, want) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("b", "t", "s", "h", "d"),
    [(2, 4096, 300, 16, 72), (4, 256, 256, 16, 72), (2, 100, 77, 3, 64), (1, 1000, 512, 12, 128), (2, 65, 33, 2, 40),
     (2, 300, 1025, 4, 72), (1, 7, 1, 2, 16)],
)  # fmt: skip
def cuda_equals_reference(b: int, t: int, s: int, h: int, d: int, dtype: torch.dtype) -> None:
    q, k, v = _heads(b, t, s, h, d, dtype, "cuda")
    for mask in (None, _key_mask(b, s, dtype, "cuda") if s > 1 else None):
        wide = (q.double().cpu(), k.double().cpu(), v.double().cpu(), None if mask is None else mask.double().cpu())
        scores = torch.einsum("bthd,bshd->bhts", *wide[:2]) / math.sqrt(d) + (0 if mask is None else wide[3])
        want = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), wide[2]).reshape(b * t, h * d).cuda()
        reference = module._reference(q, k, v, mask)
        assert_as_good_as(reference, attend(q, k, v, mask), want)
        assert_as_good_as(reference, run_twin("attention", q, k, v, mask), want)


def cuda_takes_every_mask() -> None:
    """Masks of keys in any layout, and those of queries or heads: none is a fallback."""
    q, k, v = _heads(2, 96, 72, 4, 72, torch.bfloat16, "cuda")
    g = torch.Generator("cuda").manual_seed(1)
    for shape in ((2, 1, 1, 72), (1, 1, 1, 72), (2, 4, 1, 72), (1, 1, 96, 72), (2, 4, 96, 72), (2, 1, 1, 1)):
        mask = torch.randn(shape, generator=g, device="cuda").bfloat16()
        want = module._reference(q.float(), k.float(), v.float(), mask.float().expand(2, 4, 96, 72))
        assert relative_rms(attend(q, k, v, mask), want) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("b", "t", "s", "h", "d"),
    [(2, 300, 2048, 3, 72), (1, 128, 2049, 2, 64), (2, 65, 2300, 2, 96), (1, 513, 4429, 2, 80), (3, 1, 2176, 1, 88)],
)
def cuda_hopper_equals_reference(b: int, t: int, s: int, h: int, d: int, dtype: torch.dtype) -> None:
    q, k, v = _heads(b, t, s, h, d, dtype, "cuda")
    if twin("attention").hopper_for(q, k, v, None) is None:
        pytest.skip("no Hopper GPU, or a Triton without Gluon")
    want = module._reference(q.float(), k.float(), v.float(), None)
    assert_as_good_as(module._reference(q, k, v, None), attend(q, k, v, None), want)


def cuda_hopper_samples_are_alone() -> None:
    """A sample's result has the same bits whatever its neighbours hold, also where a block of keys reaches into one."""
    q, k, v = _heads(3, 200, 2100, 2, 72, torch.bfloat16, "cuda")
    whole = attend(q, k, v, None).view(3, 200, -1)
    for i in range(3):
        assert torch.equal(attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], None), whole[i])
    assert torch.equal(attend(q * 1.5, k, v, None), attend(q * 1.5, k.contiguous(), v.contiguous(), None))


def cuda_prefers_the_faster() -> None:
    hopper = torch.cuda.get_device_capability()[0] == 9
    for shape, masked, triton in (
        ((2, 4096, 300, 16, 72), True, hopper),
        ((2, 4096, 300, 16, 72), False, False),
        ((2, 256, 256, 16, 72), False, hopper),
        ((1, 4096, 1024, 2, 72), False, False),
        ((1, 4096, 4096, 2, 128), False, False),
    ):
        b, _, s, _, _ = shape
        mask = _key_mask(b, s, torch.bfloat16, "cuda") if masked else None
        args = (*_heads(*shape, torch.bfloat16, "cuda"), mask)
        assert (sdpa.supports("attention", *args) is not None) == triton, shape
    assert sdpa.supports("attention", *_heads(1, 64, 64, 2, 64, torch.float32, "cuda"), None) is None
