"""Run `interpreter_cases.py` in a process of its own: the interpreter must be chosen before Triton is imported."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def test_triton_twins_equal_the_references_under_the_interpreter(child_environment: dict[str, str]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the Triton interpreter does not run loops with numpy {np.__version__}")
    # Without a visible GPU the interpreter cannot pick up a driver, and CPU tensors are all it needs.
    environment = {**child_environment, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/kernels/interpreter_cases.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
