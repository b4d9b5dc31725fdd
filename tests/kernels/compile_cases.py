"""Compile cases for GPUs that are not here; prints one JSON line per kernel and architecture.

    python compile_cases.py [PART/PARTS] [FILE] [ARCHITECTURE]        default: all of them

A separate program because a compiler failure can abort the process, and because the interpreter must be off.
"""

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cases import _case
from cases._offline import inspect_cubin, pretend

# Everything else is a multiple of 16 in every layer of a DiT, or the kernels do not specialise it.
UNALIGNED = {"M", "ROWS", "BLOCKS", "TOKENS", "OFFSET", "BATCHES", "factor", "eps"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compile_case(case: _case.Compile, architecture: str) -> dict[str, Any]:
    """Compile one kernel and return its register, stack and shared memory use and its matrix instructions."""
    amd = architecture.startswith("gfx")
    given = {**case.constants, **case.amd} if amd else case.constants
    options = {name: value for name, value in given.items() if name in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in given:
            signature[name] = "constexpr"
            constants[(index,)] = given[name]
            continue
        signature[name] = case.types[name]
        if name not in UNALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture), 32)
    compiled = triton.compile(source, target=pretend(target), options=options)
    if amd:
        found = inspect_amdgcn(compiled.asm["amdgcn"])
    else:
        found = inspect_cubin(compiled.asm["cubin"], disassemble=architecture in case.units)
        found["waits"] = "griddepcontrol.wait" in compiled.asm["ptx"]
        found["ptx"] = case.ptx.get(architecture, "") in compiled.asm["ptx"]
    return {"shared": compiled.metadata.shared, **found}


def inspect_amdgcn(text: str) -> dict[str, Any]:
    """Bytes of scratch memory and matrix instructions of a kernel compiled for an AMD GPU."""
    scratch = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
    assert scratch is not None
    return {"stack": int(scratch.group(1)), "mma": sorted(set(re.findall(r"\bv_mfma_[a-z0-9]+", text)))}


def main(wanted: list[str]) -> None:
    part, parts = next((map(int, word.split("/")) for word in wanted if "/" in word), (0, 1))
    words = {word for word in wanted if "/" not in word}
    jobs = [
        (name, case, architecture)
        for name in _case.names()
        for case in _case.load(name).compile_cases()
        for architecture in case.on
        if words <= {name, architecture}
    ]
    for name, case, architecture in jobs[part::parts]:
        line = {"file": name, "architecture": architecture, "name": case.name, **compile_case(case, architecture)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
