"""For programs that compile kernels for a GPU that is not here. Imports Triton: a test that may run without it imports
this where it is used."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
UNITS = r"\b(IGMMA|HGMMA|QGMMA|QMMA|IMMA|HMMA|UTC[A-Z]*MMA)\b"


class _Driver:
    """Stands in for the driver of a GPU while nothing is launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(target: GPUTarget) -> GPUTarget:
    """Make `target` the GPU that kernels see while they are compiled: they may ask which one it is."""
    driver.set_active(_Driver(target))
    return target


def inspect_cubin(cubin: bytes, disassemble: bool) -> dict[str, Any]:
    """Registers, stack bytes and, on request, matrix instructions of a kernel; empty without NVIDIA's tools."""
    if not (BIN / "cuobjdump").exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / "cuobjdump", "-res-usage", *(["-sass"] if disassemble else []), file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    usage = {name: re.search(rf"\b{name}:(\d+)", text) for name in ("REG", "STACK")}
    found: dict[str, Any] = {name.lower(): int(match.group(1)) for name, match in usage.items() if match}
    assert len(found) == 2, text[:2000]
    return found | ({"mma": sorted(set(re.findall(UNITS, done.stdout)))} if disassemble else {})
