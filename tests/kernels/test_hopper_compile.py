"""Compile the Hopper kernels without a GPU, every tile of every op: it fits, nothing spills, tensor cores work and are
not waited for after each instruction.

Run as a program, `python test_hopper_compile.py <op>`, it prints one JSON line a tile: a compiler failure can end the
process, and Gluon has no interpreter.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

SHARED = 227 * 1024
"""Bytes of shared memory that the programs of one Hopper processor can use."""
OPS = {
    "int8_linear": ["IGMMA"], "int8_linear_add": ["IGMMA"], "low_rank-32": ["HGMMA", "IGMMA"],
    "low_rank-128": ["HGMMA", "IGMMA"], "low_rank-32-add": ["HGMMA", "IGMMA"], "low_rank-96-add": ["HGMMA", "IGMMA"],
    "attention": ["HGMMA"],
}  # fmt: skip
"""Op, for `int8_linear_low_rank` with its rank, -> its matrix instructions."""


@pytest.fixture(scope="module")
def compiled(child_environment: dict[str, str], tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Op -> what its tiles compile to; all at once, in a cache of their own."""
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
        assert tile["mma"] == OPS[op], tile
        # One wait for each instruction is what the assembler resorts to where registers do not suffice.
        assert tile["mma_waits"] < 0.8, tile


def int8_tiles(op: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Launch options and compiled kernel of every tile."""
    from cases._offline import CompileOnly
    from vdit_quant.kernels._triton import hopper, int8_hopper

    int8_hopper._processors = lambda device: 132
    int8_hopper.int8_hopper_kernel = CompileOnly(int8_hopper.int8_hopper_kernel)
    m, n, k, samples = 512, 768, 128, 2
    codes, weight = (torch.zeros(rows, k, dtype=torch.int8) for rows in (m, n))
    residual, gate = (torch.zeros(rows, n, dtype=torch.bfloat16) for rows in (m, samples))
    tensors = (codes, torch.ones(m), weight, torch.ones(n), gate[0])
    added = hopper.Ending(residual, gate, m // samples) if "add" in op else hopper.Ending()
    if "low_rank" in op:
        rank = int(op.split("-")[1])
        low, up = (torch.zeros(rows, rank, dtype=torch.bfloat16) for rows in (m, n))
        owner = None if "add" in op else torch.zeros(2, dtype=torch.uint8)
        added = added._replace(low=low, up=up, owner=owner)
    for options in hopper.ADDED if added.residual is not None else hopper.STORED:
        int8_hopper._compiled.clear()
        int8_hopper.launch(*tensors, torch.empty_like(residual), options, added)
        yield options, int8_hopper.int8_hopper_kernel.compiled


def attention_tiles(op: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """As `int8_tiles`, one for each size of a head."""
    from cases._offline import CompileOnly
    from vdit_quant.kernels._triton import attention_hopper

    attention_hopper.attention_hopper_kernel = CompileOnly(attention_hopper.attention_hopper_kernel)
    for d in (64, 72, 80, 88, 96):
        q, k, v = torch.zeros(2, 256, 3, 2, d, dtype=torch.bfloat16).unbind(2)
        assert attention_hopper.refusal(q, k, v) is None
        attention_hopper.launch(q, k, v, torch.zeros(512, 2 * d, dtype=torch.bfloat16))
        yield {"head_dim": d, "PROGRAMS": 1}, attention_hopper.attention_hopper_kernel.compiled


def main(op: str) -> None:
    from triton.backends.compiler import GPUTarget

    from cases._offline import inspect_cubin, pretend

    pretend(GPUTarget("cuda", 90, 32))
    for options, kernel in (attention_tiles if op == "attention" else int8_tiles)(op):
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
