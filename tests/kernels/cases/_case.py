"""What the files of this folder say about an op, and how the tests beside it find them.

A file covers one op, or a family that shares code, and holds

* `OPS`: op name -> the callable of `vdit_quant.kernels`
* `examples(a)`: op name -> argument tuples made of the random layer `a`, for torch.library's checks
* `compile_cases()`: `Compile`s, the kernels of the Triton twin as they are launched
* `interpreter_*`: tests of the twin under Triton's interpreter against the reference
* `cuda_*`: tests of the op on a GPU against the reference, where falling back is an error
* `LIMITS`, optional: (op, facts, reason or None), what `dispatch.explain` answers

The last two kinds are pytest functions: marks and the fixtures of conftest.py work. Nothing here imports Triton before
it is asked for: `twin(op)` does.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels import dispatch

twin = dispatch.twin
E4M3 = torch.float8_e4m3fn
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

# Shapes for the interpreter, which takes a millisecond an instruction.
SHAPES = [(1, 72, 33), (17, 200, 40), (129, 33, 130), (65, 320, 136)]
GROUPED = [(1, 64, 33, 16), (17, 192, 40, 32), (129, 192, 70, 64), (3, 384, 35, 128)]
# The interpreter truncates when it writes bf16, twice the error of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# Shapes for a GPU: layers (K, N) of models in use, and some that fit no tile.
TOKENS = (1, 17, 64, 129, 4429)
DIT_XL = [(1152, 3456), (1152, 4608), (4608, 1152), (1152, 6912)]
FLUX = [(3072, 12288), (15360, 3072)]
RAGGED = [(2240, 2240), (72, 40), (200, 130)]
LAYERS = DIT_XL + FLUX + RAGGED
GROUPED_LAYERS = [
    (k, n, g) for k, n in DIT_XL[:1] + FLUX + RAGGED for g in (None, 16, 32, 64, 128) if g is None or k % g == 0
]
ROWS = [72, 200, 1152, 2240, 3072, 15360]

HOPPER = ("90",)
TWO = ("80", "90")
NVIDIA = ("80", "89", "90", "100", "120")
WITH_FP8 = ("89", "90", "100", "120")
EVERYWHERE = (*NVIDIA, "gfx942")
"""Compute capabilities of NVIDIA's GPUs, and AMD's name of one of its own: for what most of a forward pass is."""
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="fp8 needs compute capability 8.9"
)

Units = Mapping[str, str]
INT8: Units = {
    "80": "IMMA", "89": "IMMA", "90": "IGMMA", "100": "IMMA", "120": "IMMA", "gfx942": "v_mfma_i32",
}  # fmt: skip
"""Architecture -> the one matrix instruction of a large int8 product; of other products below."""
FP8: Units = {"89": "QMMA", "90": "QGMMA", "100": "UTCQMMA", "120": "QMMA"}
FLOAT: Units = {
    "80": "HMMA", "89": "HMMA", "90": "HGMMA", "100": "UTCHMMA", "120": "HMMA", "gfx942": "v_mfma_f32",
}  # fmt: skip
FP4: Units = {"100": "UTCOMMA", "120": "OMMA"}
FEW_TOKENS: Units = {**FLOAT, "90": "HMMA", "100": "HMMA"}
"""Programs of fewer than four warps cannot use Hopper's products of a warp group."""

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
SIZES = {"M": "i32", "N": "i32", "K": "i32"}
LINEAR = {"w_ptr": "*i8", "scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "bias_ptr": "*bf16", **SIZES}
"""Types of parameters that the products share."""


@dataclass(frozen=True)
class Compile:
    """A kernel with the types of its parameters, its constants and launch options, and what it must become.

    on: the architectures to compile it for; beside Hopper those where it is hot, or its layout another
    units: architecture -> the matrix instruction that it must use
    mixed: whether it may use others beside
    ptx: architecture -> what its PTX must contain
    amd: constants and options that are others on AMD's GPUs
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    on: tuple[str, ...] = HOPPER
    units: Units = field(default_factory=dict)
    mixed: bool = False
    ptx: Mapping[str, str] = field(default_factory=dict)
    amd: Mapping[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """The files of this folder that cover ops."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def load(name: str) -> ModuleType:
    """The module of one of these files."""
    return importlib.import_module(f"{__package__}.{name}")


def tests(kind: str) -> dict[str, Callable[..., None]]:
    """Every function KIND_something of every file, as test_FILE_something."""
    return {
        f"test_{name}_{function.removeprefix(kind + '_')}": value
        for name in names()
        for function, value in vars(load(name)).items()
        if function.startswith(f"{kind}_")
    }


ran: set[str] = set()
"""Ops whose twin `run_twin` has run in this process."""


def run_twin(op: str, *args: Any) -> Any:
    """What the Triton twin of `op` makes of these tensors, on any device."""
    ran.add(op)
    return twin(op).run(op, *args)


def relative_rms(got: Tensor, want: Tensor) -> float:
    """rms(got - want) / rms(want), in float64."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def assert_as_good_as(reference: Tensor, got: Tensor, want: Tensor) -> None:
    """The error of `got` to the float64 `want` is at most twice the reference's own."""
    # Two float32 sums of K terms in different orders differ by about 2**-24 * sqrt(K / 6), 3e-6 for K = 15360.
    assert got.dtype == reference.dtype
    assert relative_rms(got, want) <= max(2 * relative_rms(reference, want), 5e-6)
