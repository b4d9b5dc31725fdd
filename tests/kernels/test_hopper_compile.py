"""Compile the Hopper kernel without a GPU, every tile of both ops: it fits, nothing spills, integer tensor cores work.

Run as a program, `python test_hopper_compile.py <op>`, it prints one JSON line a tile: a compiler failure can end the
process, and Gluon has no interpreter.
"""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

SHARED = 227 * 1024
"""Bytes of shared memory that the programs of one Hopper processor can use."""
OPS = ("int8_linear", "int8_linear_add")


@pytest.fixture(scope="module")
def compiled(child_environment: dict[str, str], tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Op -> what its tiles compile to; the two at once, in a cache of their own."""
    pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
    environment = {**child_environment, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    children = {
        op: subprocess.Popen(
            [sys.executable, __file__, op], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for op in OPS
    }
    found = {}
    for op, child in children.items():
        out, err = child.communicate(timeout=300)
        assert child.returncode == 0, err[-4000:]
        found[op] = [json.loads(line) for line in out.splitlines()]
    return found


@pytest.mark.parametrize("op", OPS)
def test_every_tile_fits_and_spills_nothing(op: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    assert len(compiled[op]) >= 4
    for tile in compiled[op]:
        # A processor keeps 1 KiB of each program for itself.
        assert (tile["shared"] + 1024) * tile["programs"] <= SHARED + 1024, tile
        assert tile["waits"], tile
        if "stack" not in tile:
            pytest.skip("NVIDIA's cuobjdump is not part of this Triton")
        assert tile["stack"] == 0, tile
        assert tile["mma"] == ["IGMMA"], tile


class _CompileOnly:
    """A kernel whose launch ends with the compiled code."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


def main(op: str) -> None:
    from triton.backends.compiler import GPUTarget

    from cases._offline import inspect_cubin, pretend
    from vdit_quant.kernels._triton import hopper, int8_hopper

    pretend(GPUTarget("cuda", 90, 32))
    int8_hopper._processors = lambda device: 132
    int8_hopper.int8_hopper_kernel = _CompileOnly(int8_hopper.int8_hopper_kernel)
    m, n, k, samples = 512, 768, 128, 2
    codes, weight = (torch.zeros(rows, k, dtype=torch.int8) for rows in (m, n))
    residual, gate = (torch.zeros(rows, n, dtype=torch.bfloat16) for rows in (m, samples))
    tensors = (codes, torch.ones(m), weight, torch.ones(n), gate[0])
    added = (residual, gate, m // samples) if op == "int8_linear_add" else None
    for options in hopper.ADDED if added else hopper.STORED:
        int8_hopper._compiled.clear()
        int8_hopper.launch(*tensors, torch.empty_like(residual), options, added)
        ((kernel, _),) = int8_hopper._compiled.values()
        waits = "griddepcontrol.wait" in kernel.asm["ptx"]
        found = {
            "shared": kernel.metadata.shared,
            "waits": waits,
            **inspect_cubin(kernel.asm["cubin"], disassemble=True),
        }
        sys.stdout.write(json.dumps({"programs": options["PROGRAMS"], "options": options, **found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
