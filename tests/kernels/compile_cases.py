"""Compile the Triton kernels of one op for one GPU without having it; prints one JSON line per kernel.

    python compile_cases.py <file in kernels/_triton> <compute capability>

A separate program because a compiler failure can abort the process, and because the interpreter must be off.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vdit_quant.kernels._triton import (
    act_quant,
    hadamard,
    int4_linear,
    int8_linear,
    norm_quant,
    packed_decode,
    quant_token,
    rows,
)
from vdit_quant.kernels._triton.tiles import ROUND_EACH_STEP
from vdit_quant.kernels.transform import Transform

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
LINEAR = {"w_ptr": "*i8", "scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
SIZES = {"M": "i32", "N": "i32", "K": "i32"}
Case = tuple[str, Any, dict[str, str], dict[str, Any]]


def quant_token_cases() -> Iterator[Case]:
    for k in (1152, 3072, 15360):
        types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", **SIZES}
        consts = {"TINY": 1e-30, **quant_token.launch_options(k), **ROUND_EACH_STEP}
        yield f"quant_token K={k}", quant_token.quant_token_kernel, types, consts


def int8_linear_cases() -> Iterator[Case]:
    for m, even in ((1, True), (17, True), (64, True), (512, True), (4096, True), (4096, False)):
        types = {**LINEAR, "x_ptr": "*i8", "y_ptr": "*bf16", **SIZES}
        consts = {"HAS_BIAS": True, "EVEN_K": even, **int8_linear.int8_options(m, 3456), **ROUND_EACH_STEP}
        yield f"int8_linear M={m} even={even}", int8_linear.int8_linear_kernel, types, consts
    for m, dtype in ((1, torch.bfloat16), (64, torch.bfloat16), (4096, torch.bfloat16), (4096, torch.float32)):
        types = {**LINEAR, "x_ptr": POINTERS[dtype], "y_ptr": POINTERS[dtype], **SIZES}
        options = int8_linear.weight_only_options(m, dtype)
        consts = {"HAS_BIAS": True, "EVEN_K": True, "DOT": int8_linear.dot_dtype(dtype), **options}
        yield f"int8_weight_linear M={m} {dtype}", int8_linear.int8_weight_linear_kernel, types, consts


def int4_linear_cases() -> Iterator[Case]:
    for group in (0, 32):
        types = {"w_ptr": "*u8", "group_ptr": "*u8", "out_ptr": "*i8", "N": "i32", "K": "i32"}
        consts = {"GROUP": group, **int4_linear.decode_options(1152)}
        yield f"int4_to_int8 group={group}", int4_linear.int4_to_int8_kernel, types, consts
    i8, bf16 = torch.int8, torch.bfloat16
    for m, dtype, group in ((1, i8, 64), (64, i8, 0), (64, i8, 128), (1, bf16, 16), (64, bf16, 64)):
        types = {**LINEAR, "w_ptr": "*u8", "group_ptr": "*u8", "x_ptr": POINTERS[dtype], "y_ptr": "*bf16", **SIZES}
        dot = triton.language.int8 if dtype == i8 else int8_linear.dot_dtype(dtype)
        consts = {"HAS_BIAS": True, "EVEN_K": True, "INT8": dtype == i8, "DOT": dot, "GROUP": group}
        consts |= int4_linear.fused_options(m) | (ROUND_EACH_STEP if dtype == i8 else {})
        yield f"int4_linear M={m} {dtype} group={group}", int4_linear.int4_linear_kernel, types, consts


def packed_decode_cases() -> Iterator[Case]:
    for bits, odd, group in ((2, True, 64), (3, False, 0), (3, False, 64), (6, False, 128)):
        types = {"w_ptr": "*u8", "group_ptr": "*u8", "out_ptr": "*i8", "N": "i32", "K": "i32"}
        consts = {"BITS": bits, "ODD": odd, "GROUP": group, **packed_decode.launch_options(1152)}
        yield f"packed_to_int8 bits={bits} group={group}", packed_decode.packed_to_int8_kernel, types, consts


def hadamard_cases() -> Iterator[Case]:
    for size, dtype in ((16, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)):
        pointer = POINTERS[dtype]
        types = {"x_ptr": pointer, "signs_ptr": "*i8", "h_ptr": pointer, "y_ptr": pointer}
        types |= {"ROWS": "i32", "BLOCKS": "i32", "factor": "fp32"}
        consts = {"HAS_SIGNS": True, "DOT": int8_linear.dot_dtype(dtype), "SIZE": size}
        consts |= hadamard.launch_options(size, dtype)
        yield f"hadamard b={size} {dtype}", hadamard.hadamard_kernel, types, consts


PRODUCER = {"pre_scale_ptr": "*fp32", "signs_ptr": "*i8", "pairs_ptr": "*i16", "scale_ptr": "*fp32", "x_stride": "i32"}
# bfloat16 is read as pairs, see `rows.readable`
PRODUCER |= {"x_ptr": "*i32", "hadamard_ptr": "*fp16", "M": "i32"}


def producer_consts(k: int, block_size: int, dtype: torch.dtype = torch.int8) -> dict[str, Any]:
    """Tiles for rows of k channels; with a rotation also a channel scale and signs."""
    vectors = (torch.ones(k), torch.ones(k, dtype=torch.int8)) if block_size else (None, None)
    return rows.tile_options(k, Transform(*vectors, block_size, "sylvester", dtype))


def norm_quant_cases() -> Iterator[Case]:
    types = dict.fromkeys(("branch_ptr", "gate_ptr", "shift_ptr", "mod_scale_ptr", "weight_ptr", "bias_ptr"), "*i32")
    types |= {"h_ptr": "*bf16", "TOKENS": "i32", "eps": "fp32", **PRODUCER}
    types |= {f"{name}_stride": "i32" for name in ("branch", "gate", "shift", "mod_scale")}
    gates = ((1152, 0), (1152, 64), (1152, 128), (1536, 64), (3072, 0), (3072, 128), (5120, 128))
    for gated, cases in ((True, gates), (False, ((1152, 0), (2240, 0), (2240, 64), (3072, 64), (5120, 0)))):
        for k, block_size in cases:
            consts = {"HAS_BRANCH": gated, "HAS_GATE": gated, "HAS_MOD": True, "LAYER": True, "AFFINE": 0}
            consts |= producer_consts(k, block_size)
            yield f"norm_quant K={k} b={block_size} gated={gated}", norm_quant.norm_quant_kernel, types, consts


def act_quant_cases() -> Iterator[Case]:
    types = {"HALF": "i32", **PRODUCER}
    shapes = ((1152, 0), (1152, 16), (4608, 0), (4608, 128), (12288, 0), (12288, 128), (13824, 128), (15360, 64))
    for k, block_size in shapes:
        consts = {"ACT": "gelu_tanh" if k > 4000 else "none", **producer_consts(k, block_size)}
        yield f"act_quant K={k} b={block_size}", act_quant.act_quant_kernel, types, consts
    for act in ("gelu", "swiglu", "geglu"):
        consts = {"ACT": act, **producer_consts(12288, 0)}
        yield f"act_quant K=12288 {act}", act_quant.act_quant_kernel, types, consts


def fp8_quant_cases() -> Iterator[Case]:
    types = {"HALF": "i32", **PRODUCER}
    for block_size in (0, 128):
        consts = {"ACT": "none", **producer_consts(3072, block_size, torch.float8_e4m3fn)}
        yield f"act_quant to fp8 b={block_size}", act_quant.act_quant_kernel, types, consts


def compile_case(kernel: Any, types: dict[str, str], consts: dict[str, Any], capability: int) -> dict[str, Any]:
    """Compile one kernel and return its register, stack and shared memory use and its matrix instructions."""
    options = {name: consts.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in consts}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in consts:
            signature[name] = "constexpr"
            constants[(index,)] = consts[name]
            continue
        signature[name] = types[name]
        # M is not specialised by the kernels; everything else is a multiple of 16 in every layer of a DiT.
        if name not in ("M", "ROWS", "BLOCKS", "TOKENS", "factor", "eps"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": compiled.metadata.shared, **inspect_cubin(compiled.asm["cubin"])}


def inspect_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, stack bytes and matrix instructions of a compiled kernel; empty without NVIDIA's tools."""
    if not (BIN / "cuobjdump").exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([BIN / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    found = {name.lower(): int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK")}
    return {**found, "mma": sorted(set(re.findall(r"\b(IGMMA|HGMMA|IMMA|HMMA)\b", sass.stdout)))}


def main(file: str, capability: int) -> None:
    for name, kernel, types, consts in globals()[f"{file}_cases"]():
        result = compile_case(kernel, types, consts, capability)
        sys.stdout.write(json.dumps({"name": name, **result}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
