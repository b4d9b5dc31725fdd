from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import hadamard as module
from vdit_quant.kernels.hadamard import hadamard, hadamard_matrix

from ._case import FLOATS, POINTERS, TOKENS, TOLERANCE, Compile, assert_as_good_as, relative_rms, run_twin, twin

OPS = {"hadamard": hadamard}
LIMITS = [
    ("hadamard", {"block_size": 8}, "block_size 8 is outside 16 to 1024"),
    ("hadamard", {"block_size": 128, "dtype": torch.bfloat16, "k": 1152}, None),
]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {"hadamard": [(a.x, torch.ones(64, dtype=torch.int8), 16, "sylvester"), (a.x, None, 64, "regular")]}


def compile_cases() -> Iterator[Compile]:
    file, bf16 = twin("hadamard"), torch.bfloat16
    for size, dtype in ((16, bf16), (128, bf16), (256, bf16), (128, torch.float32)):
        types = {**dict.fromkeys(("x_ptr", "h_ptr", "y_ptr"), POINTERS[dtype]), "signs_ptr": "*i8"}
        types |= {"ROWS": "i32", "BLOCKS": "i32", "factor": "fp32"}
        constants = {"HAS_SIGNS": True, "DOT": file.dot_dtype(dtype), "SIZE": size}
        constants |= file.launch_options(size, dtype)
        yield Compile(f"b={size} {dtype}", file.hadamard_kernel, types, constants)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("size", "kind"), [(16, "regular"), (64, "sylvester"), (128, "sylvester"), (256, "regular")])
def interpreter_equals_reference(size: int, kind: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(17, 512, generator=g).to(dtype)
    signs = (torch.randint(0, 2, (512,), generator=g) * 2 - 1).to(torch.int8)
    for chosen in (signs, None):
        got = run_twin("hadamard", x, chosen, size, kind)
        assert relative_rms(got, hadamard(x, chosen, size, kind)) < TOLERANCE[dtype]


def interpreter_empty_batches() -> None:
    assert run_twin("hadamard", torch.ones(0, 64), None, 64, "sylvester").shape == (0, 64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "size"), [("sylvester", 16), ("sylvester", 128), ("regular", 64), ("regular", 256)])
def cuda_equals_reference(kind: str, size: int, dtype: torch.dtype, make_layer) -> None:
    h = hadamard_matrix(size, kind).cuda().double() / size**0.5
    for m in TOKENS:
        a = make_layer(m, 9 * size, 1, dtype=dtype, device="cuda")
        signs = (a.codes[0] | 1).sign()
        want = ((a.x.double() * signs).view(-1, size) @ h).view(m, -1)
        assert_as_good_as(module._reference(a.x, signs, size, kind), hadamard(a.x, signs, size, kind), want)
