"""Compile the Triton kernels for GPUs that are not here: no spills, and tensor cores where they are due.

Every case for Hopper, the hot kernels for the others.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("compile_cases.py")
FILES = (
    "quant_token",
    "int8_linear",
    "int8_linear_add",
    "int8_linear_low_rank",
    "int4_linear",
    "packed_decode",
    "codebook_decode",
    "quant_token_fp4",
    "hadamard",
    "fp8_linear",
)
CAPABILITIES = (80, 90)
TARGETS = [(file, cap) for file in FILES for cap in CAPABILITIES if (file, cap) != ("fp8_linear", 80)]
TARGETS.append(("fp8_linear", 89))  # the first GPUs with fp8
FILES = ("quant_token+int8_linear+int4_linear+hadamard", "int4_decode+int4_fused+weight_linear+packed_decode")
UNITS = {
    "80": ("IMMA", "HMMA"),
    "89": ("IMMA", "HMMA"),
    "90": ("IGMMA", "HMMA"),
    "100": ("IMMA", "HMMA"),
    "120": ("IMMA", "HMMA"),
    "gfx942": ("v_mfma_i32", "v_mfma_f32"),
}
"""Architecture -> the matrix instruction of int8 products, and of few float tokens x low-bit weights."""

TARGETS = [(file, "90") for file in FILES] + [("hot", name) for name in UNITS if name != "90"]
Target = tuple[str, str]


@pytest.fixture(scope="module")
def compiled(child_environment: dict[str, str], tmp_path_factory) -> dict[Target, Any]:
    """(file, architecture) -> finished process; two at a time, in a cache of their own."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**child_environment, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def build(target: Target) -> Any:
        command = [sys.executable, str(SCRIPT), *target]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TARGETS, pool.map(build, TARGETS), strict=True))


@pytest.mark.parametrize(("file", "capability"), TARGETS)
def test_compiles_without_spills(file: str, capability: int, compiled: dict[tuple[str, int], Any]) -> None:
    done = compiled[file, capability]


def kernels_of(done: Any) -> list[dict[str, Any]]:
    """What one process compiled; all of it, or this fails."""
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found
    return found


@pytest.mark.parametrize("target", TARGETS, ids="-".join)
def test_compiles_without_spills(target: Target, compiled: dict[Target, Any]) -> None:
    for kernel in kernels_of(compiled[target]):
        # 99 KiB is what one program may use on the consumer GPUs of every generation since 8.6, 64 KiB on AMD's.
        assert kernel["shared"] <= (64 if target[1].startswith("gfx") else 99) * 1024, kernel
        if "stack" in kernel:
            assert kernel["stack"] == 0, kernel


@pytest.mark.parametrize(
    ("file", "capability", "unit"),
    [
        ("int8_linear", 80, "IMMA"),
        ("int8_linear", 90, "IGMMA"),
        ("int8_linear_add", 90, "IGMMA"),
        ("fp8_linear", 89, "QMMA"),
        ("fp8_linear", 90, "QGMMA"),
    ],
)
def test_large_products_use_the_matrix_units(
    file: str, capability: int, unit: str, compiled: dict[tuple[str, int], Any]
) -> None:
    kernels = [json.loads(line) for line in compiled[file, capability].stdout.splitlines()]
    large = [kernel for kernel in kernels if kernel["name"].startswith((f"{file} M=4096", f"{file} M=8192"))]
    if "mma" not in large[0]:
        pytest.skip("NVIDIA's cuobjdump is not part of this Triton")
    assert all(kernel["mma"] == [unit] for kernel in large)


@pytest.mark.parametrize("architecture", UNITS)
def test_products_use_the_matrix_units(architecture: str, compiled: dict[Target, Any]) -> None:
    files = FILES if architecture == "90" else ("hot",)
    found = {kernel["name"]: kernel for file in files for kernel in kernels_of(compiled[file, architecture])}
    if any("mma" not in kernel for kernel in found.values()):
        pytest.skip("NVIDIA's cuobjdump is not part of this Triton")
    integer, floating = UNITS[architecture]
    large = [kernel for name, kernel in found.items() if name.startswith(("int8_linear M=4096", "int4_fused"))]
    small = [kernel for name, kernel in found.items() if name.startswith("small_weight")]
    assert len(large) >= 2
    assert len(small) >= 1
    assert all(kernel["mma"] == [integer] for kernel in large), large
    assert all(kernel["mma"] == [floating] for kernel in small), small
