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
from inspect import signature as parameters_of
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vdit_quant.kernels._triton import (
    attention,
    hadamard,
    head_norm_rope,
    int4_linear,
    int8_linear,
    int8_linear_add,
    int8_linear_low_rank,
    packed_decode,
    quant_token,
)
from vdit_quant.kernels._triton.tiles import ROUND_EACH_STEP

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
LINEAR = {"w_ptr": "*i8", "scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
SIZES = {"M": "i32", "N": "i32", "K": "i32"}
UNALIGNED = {"M", "ROWS", "BLOCKS", "factor", "scale", "eps", "TQ", "TK", "HEADS", "TOKENS", "OFFSET", "BATCHES"}
UNALIGNED |= {f"{tensor}_{stride}" for tensor in "qkv" for stride in "bth"}
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


def int8_linear_add_cases() -> Iterator[Case]:
    pointers = {"residual_ptr": "*bf16", "gate_ptr": "*bf16", "TOKENS": "i32", "GATE_STRIDE": "i32"}
    for m, n, gate, tokens in (
        (512, 1152, True, 256),
        (8192, 1152, True, 256),
        (8192, 1152, True, 64),
        (8192, 1152, False, 8192),
    ):
        types = {**LINEAR, "x_ptr": "*i8", "y_ptr": "*bf16", **pointers, **SIZES}
        options, one = int8_linear_add.launch_options(m, n, tokens)
        consts = {"HAS_BIAS": True, "HAS_GATE": gate, "ONE_SAMPLE": one, "EVEN_K": True, **options, **ROUND_EACH_STEP}
        yield f"int8_linear_add M={m} gate={gate} one={one}", int8_linear_add.int8_linear_add_kernel, types, consts


def int8_linear_low_rank_cases() -> Iterator[Case]:
    for m, rank, dtype in (
        (17, 32, torch.bfloat16),
        (512, 16, torch.bfloat16),
        (8192, 32, torch.bfloat16),
        (8192, 32, torch.float32),
    ):
        pointer = POINTERS[dtype]
        types = {**LINEAR, "x_ptr": "*i8", "y_ptr": "*bf16", "low_ptr": pointer, "up_ptr": pointer, "R": "i32", **SIZES}
        consts = {"HAS_BIAS": True, "EVEN_K": True, "DOT": int8_linear.dot_dtype(dtype)}
        consts |= {**int8_linear_low_rank.launch_options(m, 4608, rank, dtype), **ROUND_EACH_STEP}
        yield f"low_rank M={m} R={rank} {dtype}", int8_linear_low_rank.int8_linear_low_rank_kernel, types, consts


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


def head_norm_rope_cases() -> Iterator[Case]:
    types = {**dict.fromkeys(("x_ptr", "q_weight_ptr", "k_weight_ptr", "y_ptr"), "*bf16"), "eps": "fp32"}
    types |= {**dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"), **dict.fromkeys(("x_b", "x_t"), "i32")}
    types |= dict.fromkeys(("TOKENS", "OFFSET", "BATCHES"), "i32")
    for heads, head_dim, every in ((24, 128, False), (38, 64, False), (40, 128, True)):
        consts = {"HEADS": heads, "HEAD": head_dim, "NORM": True, "ALL": every, "ROPE": True}
        consts |= head_norm_rope.launch_options(heads, head_dim)
        name = f"head_norm_rope {heads}x{head_dim} all={every}"
        yield name, head_norm_rope.head_norm_rope_kernel, types, consts


def attention_cases(capability: int) -> Iterator[Case]:
    for head_dim in (64, 72, 128):
        types = {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "y_ptr"), "*bf16"), "scale": "fp32"}
        types |= dict.fromkeys(("TQ", "TK", "HEADS"), "i32")
        types |= {f"{tensor}_{stride}": "i32" for tensor in "qkv" for stride in "bth"}
        main, tail = attention.parts(head_dim)
        consts = {"HEAD": head_dim, "MAIN": main, "TAIL": tail, "DOT": triton.language.bfloat16}
        consts |= attention.launch_options(head_dim, capability == 90)
        yield f"attention hd={head_dim}", attention.attention_kernel, types, consts


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
        # Everything else is a multiple of 16 in every layer of a DiT.
        if name not in UNALIGNED:
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
    cases = globals()[f"{file}_cases"]
    for name, kernel, types, consts in cases(capability) if parameters_of(cases).parameters else cases():
        result = compile_case(kernel, types, consts, capability)
        sys.stdout.write(json.dumps({"name": name, **result}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
