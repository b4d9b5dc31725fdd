"""Compile the Triton kernels for GPUs that are not here: no spills, and tensor cores where they are due."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cases import _case

SCRIPT = Path(__file__).with_name("compile_cases.py")
PROCESSES = 2
Compiled = dict[tuple[str, str], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def compiled(child_environment: dict[str, str], tmp_path_factory) -> tuple[Compiled, str]:
    """(file, architecture) -> name of a case -> what became of it; and what went wrong. In a cache of their own."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**child_environment, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def build(part: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), f"{part}/{PROCESSES}"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)

    with ThreadPoolExecutor(PROCESSES) as pool:
        done = list(pool.map(build, range(PROCESSES)))
    found: Compiled = {}
    for process in done:
        for row in map(json.loads, process.stdout.splitlines()):
            found.setdefault((row["file"], row["architecture"]), {})[row["name"]] = row
    return found, "\n".join(process.stderr[-4000:] for process in done if process.returncode)


@pytest.mark.parametrize("architecture", _case.EVERYWHERE)
@pytest.mark.parametrize("file", _case.names())
def test_compiles_without_spills_and_with_matrix_units(
    file: str, architecture: str, compiled: tuple[Compiled, str]
) -> None:
    kernels = compiled[0].get((file, architecture), {})
    for case in _case.load(file).compile_cases():
        if architecture not in case.on:
            continue
        assert case.name in kernels, f"not compiled: {case.name}\n{compiled[1]}"
        kernel, unit = kernels[case.name], case.units.get(architecture)
        # 99 KiB is what one program may use on the consumer GPUs of every generation since 8.6, 64 KiB on AMD's.
        assert kernel["shared"] <= (64 if architecture.startswith("gfx") else 99) * 1024, kernel
        # Without NVIDIA's tools, which not every build of Triton contains, this is all there is to see.
        assert kernel.get("stack", 0) == 0, kernel
        # From Hopper on a kernel may start before the one before it has ended; others do not know the instruction.
        if not architecture.startswith("gfx"):
            assert kernel["waits"] == (int(architecture) >= 90), kernel
            assert kernel["ptx"], f"{case.name}: no {case.ptx[architecture]}"
        if unit and "mma" in kernel:
            assert unit in kernel["mma"] if case.mixed else kernel["mma"] == [unit], kernel


def test_every_kernel_is_compiled_and_no_case_twice(root: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    cases = [(name, case.name) for name in _case.names() for case in _case.load(name).compile_cases()]
    assert len(cases) == len(set(cases))
    kernels = {case.kernel.__name__ for name in _case.names() for case in _case.load(name).compile_cases()}
    files = (root / "kernels" / "_triton").glob("*.py")
    # Gluon's kernels are for Hopper alone and have tests of their own.
    triton = re.compile(r"^@triton\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)
    assert kernels == {k for file in files for k in triton.findall(file.read_text())}


def test_what_is_hot_is_compiled_for_every_architecture_with_matrix_units_where_it_multiplies() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    hot = [case for name in _case.names() for case in _case.load(name).compile_cases() if case.on == _case.EVERYWHERE]
    assert {case.kernel.__name__ for case in hot} >= {
        "act_quant_kernel",
        "attention_kernel",
        "int4_bytes_kernel",
        "int4_linear_kernel",
        "int4_words_kernel",
        "int8_linear_add_kernel",
        "int8_linear_kernel",
        "norm_quant_kernel",
        "packed_to_int8_kernel",
        "quant_token_kernel",
        "small_int4_kernel",
        "small_weight_kernel",
    }
    for case in hot:
        assert set(case.units) in (set(), set(_case.EVERYWHERE)), case.name
