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
UNITS = r"\b(IGMMA|HGMMA|QGMMA|QMMA|IMMA|HMMA|OMMA|UTC[A-Z]*MMA)\b"


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


class CompileOnly:
    """A kernel whose launch ends with the compiled code, which `compiled` keeps."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.compiled = self.kernel.warmup(*args, grid=grid, **options)
            return self.compiled

        return launch


def inspect_cubin(cubin: bytes, disassemble: bool) -> dict[str, Any]:
    """Registers, stack bytes and, on request, matrix instructions of a kernel, how many waits there are for each on
    Hopper, and stores to the stack; empty without NVIDIA's tools."""
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
    if disassemble:
        found["mma"] = sorted(set(re.findall(UNITS, done.stdout)))
        found["spills"] = len(re.findall(r"\bSTL\b", done.stdout))
        found["mma_waits"] = done.stdout.count("WARPGROUP.DEPBAR") / max(1, done.stdout.count("GMMA."))
    return found
