from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import head_norm_rope as module
from vdit_quant.kernels.head_norm_rope import head_norm_rope

from ._case import EVERYWHERE, FLOATS, HOPPER, TOLERANCE, Compile, assert_as_good_as, relative_rms, run_twin, twin

OPS = {"head_norm_rope": head_norm_rope}
LIMITS = [("head_norm_rope", {"width": 32768}, "H * hd = 32768 is larger than 16384")]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    each, joint = a.x.view(3, 1, 64)[..., :48], a.x.view(1, 3, 64)[..., :48]
    return {
        "head_norm_rope": [
            (each, [a.x[0, :8]] * 2, each, [], [a.x[:2, :8]] * 2, 2, 1e-6),
            (joint, [a.x[0, :16]] * 2, None, [], [], 2, 1e-6),
            (joint, [a.x[0, :8]] * 4, None, [], [], 2, 1e-6),
        ]
    }


def compile_cases() -> Iterator[Compile]:
    file = twin("head_norm_rope")
    types = {**dict.fromkeys(("x_ptr", "q_weight_ptr", "k_weight_ptr", "q_bias_ptr", "k_bias_ptr"), "*bf16")}
    types |= {"y_ptr": "*bf16", "eps": "fp32"}
    types |= {**dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"), **dict.fromkeys(("x_b", "x_t"), "i32")}
    types |= dict.fromkeys(("TOKENS", "OFFSET", "BATCHES"), "i32")
    for heads, head_dim, every in ((24, 128, False), (38, 64, False), (48, 64, False), (40, 128, True)):
        constants = {"HEADS": heads, "HEAD": head_dim, "NORM": True, "ALL": every, "ROPE": True, "LAYER": heads == 48}
        constants |= file.launch_options(heads, head_dim)
        on = EVERYWHERE if heads == 24 else HOPPER
        yield Compile(f"{heads}x{head_dim} all={every}", file.head_norm_rope_kernel, types, constants, on)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 72), (2, 16)])
@pytest.mark.parametrize("every", [False, True])
def interpreter_equals_reference(heads: int, head_dim: int, every: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    width = heads * head_dim
    first, second = (torch.randn(2, t, 4 * width, generator=g).to(dtype)[..., : 3 * width] for t in (3, 4))
    weights = [torch.randn(width if every else head_dim, generator=g).to(dtype) for _ in range(4)]
    rope = [torch.randn(7, head_dim, generator=g) for _ in range(2)]
    first += 1  # a mean that a norm may take away
    for args in (
        (first, weights[:2], second, weights[2:], rope, heads, 1e-6),
        (first, [], second, weights[2:], [], heads, 1e-6),
        (second, weights[:2], None, [], [table[:4] for table in rope], heads, 1e-6),
        (first, weights, second, weights[::-1], rope, heads, 1e-6),
    ):
        got, want = run_twin("head_norm_rope", *args), head_norm_rope(*args)
        assert got.dtype == dtype
        assert relative_rms(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_dim", "every"), [(24, 128, False), (38, 64, False), (16, 72, True)])
def cuda_equals_reference(heads: int, head_dim: int, every: bool, dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda").to(dtype)

    width = heads * head_dim
    first, second = (normal(2, tokens, 4 * width)[..., : 3 * width] for tokens in (77, 300))
    weights = [normal(width if every else head_dim) for _ in range(4)]
    rope = [normal(377, head_dim).float() for _ in range(2)]
    for args in (
        (first, weights[:2], second, weights[2:], rope, heads, 1e-6),
        (second, weights[:2], None, [], [], heads, 1e-6),
        (first[:1], [], None, [], [table[:77] for table in rope], heads, 1e-6),
        (first + 1, weights, second, weights[::-1], rope, heads, 1e-6),
    ):
        wide: list[Any] = [[x.float() for x in a] if isinstance(a, list) else a for a in args]
        wide[0], wide[2] = args[0].float(), None if args[2] is None else args[2].float()
        want = module._reference(*wide)
        assert_as_good_as(module._reference(*args), head_norm_rope(*args), want)
