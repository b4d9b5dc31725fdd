"""Compile every Triton kernel for GPUs that are not here: no spills, and tensor cores where they are due."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("compile_cases.py")
FILES = ("quant_token", "int8_linear", "int4_linear", "packed_decode", "hadamard", "norm_quant", "act_quant")
CAPABILITIES = (80, 90)


@pytest.fixture(scope="module")
def compiled(child_environment: dict[str, str], tmp_path_factory) -> dict[tuple[str, int], Any]:
    """(file, capability) -> finished process; two at a time, in a cache of their own."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**child_environment, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def build(target: tuple[str, int]) -> Any:
        command = [sys.executable, str(SCRIPT), target[0], str(target[1])]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    targets = [(file, capability) for file in FILES for capability in CAPABILITIES] + [("fp8_quant", 90)]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(targets, pool.map(build, targets), strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("file", FILES)
def test_compiles_without_spills(file: str, capability: int, compiled: dict[tuple[str, int], Any]) -> None:
    done = compiled[file, capability]
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels
    for kernel in kernels:
        # 99 KiB is what one program may use on the consumer GPUs of every generation since 8.6.
        assert kernel["shared"] <= 99 * 1024, kernel
        if "stack" in kernel:
            assert kernel["stack"] == 0, kernel


def test_int8_products_use_the_matrix_units(compiled: dict[tuple[str, int], Any]) -> None:
    for capability, unit in ((80, "IMMA"), (90, "IGMMA")):
        kernels = [json.loads(line) for line in compiled["int8_linear", capability].stdout.splitlines()]
        large = [kernel for kernel in kernels if kernel["name"].startswith("int8_linear M=4096")]
        if "mma" not in large[0]:
            pytest.skip("NVIDIA's cuobjdump is not part of this Triton")
        assert all(kernel["mma"] == [unit] for kernel in large)


def test_rotations_use_the_matrix_units_and_fp8_compiles(compiled: dict[tuple[str, int], Any]) -> None:
    for file, capability, unit in (("norm_quant", 80, "HMMA"), ("act_quant", 90, "HGMMA"), ("fp8_quant", 90, "HGMMA")):
        done = compiled[file, capability]
        assert done.returncode == 0, done.stderr[-4000:]
        rotated = [json.loads(line) for line in done.stdout.splitlines() if "b=128" in line]
        if "mma" not in rotated[0]:
            pytest.skip("NVIDIA's cuobjdump is not part of this Triton")
        assert all(unit in kernel["mma"] and kernel["stack"] == 0 for kernel in rotated)
