"""Shared fixtures of the kernel tests: error metric, random quantised layers, subprocess environment."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels.pack import pack_int4

pytest.register_assert_rewrite("cases")

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Layer:
    """Random operands of one linear layer, in every form that the ops take."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    weight: Tensor
    packed: Tensor
    group_scale: Tensor | None
    weight_scale: Tensor
    bias: Tensor


def _make_layer(
    m: int, k: int, n: int, group: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Layer:
    g = torch.Generator(device).manual_seed(m * 7919 + k * 31 + n)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g, dtype=torch.int32, device=device)

    tensors = {
        "x": torch.randn(m, k, generator=g, device=device).to(dtype),
        "codes": integers(-127, 127, m, k).to(torch.int8),
        "scale": torch.rand(m, generator=g, device=device) * 0.02 + 1e-3,
        "weight": integers(-127, 127, n, k).to(torch.int8),
        "packed": pack_int4(integers(-8, 7, n, k)),
        "group_scale": None if group is None else integers(0, 255, n, k // group).to(torch.uint8),
        "weight_scale": torch.rand(n, generator=g, device=device) * 1e-3 + 1e-5,
        "bias": torch.randn(n, generator=g, device=device).to(dtype),
    }
    return Layer(**tensors)


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., Layer]:
    return _make_layer


@pytest.fixture(scope="session")
def relative_rms() -> Callable[[Tensor, Tensor], float]:
    """rms(got - want) / rms(want), in float64."""

    from cases import _case

    return _case.relative_rms


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """Environment of a subprocess that can import the package, with every kernel setting cleared."""
    dropped = ("TRITON_INTERPRET", "VDIT_KERNELS", "VDIT_STRICT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = [str(ROOT / "src"), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path)}
