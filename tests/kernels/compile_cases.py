"""Compile the Triton kernels of some ops for one GPU without having it; prints one JSON line per kernel.

    python compile_cases.py <files in kernels/_triton joined by +, or hot> <compute capability, or AMD architecture>

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
    codebook_decode,
    fp8_linear,
    hadamard,
    int4_decode,
    int4_fused,
    int4_linear,
    int8_linear,
    int8_linear_add,
    int8_linear_low_rank,
    packed_decode,
    quant_token,
    quant_token_fp4,
    weight_linear,
)
from vdit_quant.kernels._triton.tiles import ROUND_EACH_STEP

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


def int4_decode_cases() -> Iterator[Case]:
    types = {"w_ptr": "*u8", "group_ptr": "*u8", "scales_ptr": "*i32", "out_ptr": "*i8", **SIZES, "WORDS": "i32"}
    for group in (0, 32):
        consts = {"GROUP": group, **int4_decode.bytes_options(1152)}
        yield f"int4_to_int8 by bytes group={group}", int4_decode.int4_bytes_kernel, types, consts
        consts = {"GROUP": group, **int4_decode.words_options(1 << 20)}
        yield f"int4_to_int8 by words group={group}", int4_decode.int4_words_kernel, types, consts
    yield "int4 blocks", int4_decode.int4_blocks_kernel, types, {"GROUPED": True, "R": 64, "num_warps": 4}


def int4_fused_cases() -> Iterator[Case]:
    types = {**LINEAR, "x_ptr": "*i8", "group_ptr": "*i32", "y_ptr": "*bf16", **SIZES}
    for group, bm, warps in ((64, 64, 4), (64, 128, 8), (0, 128, 4)):
        consts = {"HAS_BIAS": True, "GROUP": group, "PTX": True, "BM": bm, "BN": 128, "GROUP_M": 8}
        consts |= {"num_warps": warps, "num_stages": 3, **ROUND_EACH_STEP}
        yield f"int4_fused BM={bm} group={group} warps={warps}", int4_fused.int4_fused_kernel, types, consts


def weight_linear_cases() -> Iterator[Case]:
    types = {**LINEAR, "x_ptr": "*bf16", "group_ptr": "*i32", "y_ptr": "*bf16", **SIZES}
    for bits, bm, n in ((8, 16, 6912), (8, 64, 193536), (4, 16, 6912), (4, 64, 193536)):
        consts = {"HAS_BIAS": True, "EVEN_K": True, "BITS": bits, "GROUPED": bits == 4, "PTX": True, "BM": bm}
        consts |= {"DOT": triton.language.bfloat16, **weight_linear.small_options(bm, n)}
        yield f"small_weight bits={bits} BM={bm} N={n}", weight_linear.small_weight_kernel, types, consts


def hot_cases() -> Iterator[Case]:
    """What most of a forward pass is: one case each, for the architectures that do not get every case."""
    wanted = ("quant_token K=1152", "int8_linear M=4096 even=True", "int4_to_int8 by words group=32")
    wanted += ("int4_fused BM=64 group=64 warps=4", "small_weight bits=8 BM=16 N=6912")
    for cases in (quant_token_cases, int8_linear_cases, int4_decode_cases, int4_fused_cases, weight_linear_cases):
        yield from (case for case in cases() if case[0] in wanted)


def int4_linear_cases() -> Iterator[Case]:
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


def fp8_linear_cases() -> Iterator[Case]:
    for k in (1152, 15360):
        types = {"x_ptr": "*bf16", "codes_ptr": "*fp8e4nv", "scale_ptr": "*fp32", **SIZES}
        consts = {"TINY": 1e-30, "INTERPRET": False, **quant_token.launch_options(k), **ROUND_EACH_STEP}
        yield f"quant_token_fp8 K={k}", fp8_linear.quant_token_fp8_kernel, types, consts
    for m in (1, 64, 512, 4096):
        types = {**LINEAR, "x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "y_ptr": "*bf16", **SIZES}
        consts = {"HAS_BIAS": True, "EVEN_K": True, **int8_linear.int8_options(m, 3456), **ROUND_EACH_STEP}
        yield f"fp8_linear M={m}", fp8_linear.fp8_linear_kernel, types, consts


def codebook_decode_cases() -> Iterator[Case]:
    for bits, length, group in ((8, 4, 0), (6, 2, 0), (4, 1, 0), (4, 1, 32), (2, 1, 0)):
        word = {1: "*i8", 2: "*i16", 4: "*i32"}[length]
        types = {"w_ptr": "*u8", "book_ptr": word, "table_ptr": "*u8", "group_ptr": "*u8", "out_ptr": word}
        types |= {"N": "i32", "C": "i32", "TABLES": "i32"}
        consts = {"BITS": bits, "HAS_TABLE": bits == 4, "GROUP": group, **codebook_decode.launch_options(1152)}
        yield f"codebook_to_int8 bits={bits} group={group}", codebook_decode.codebook_to_int8_kernel, types, consts


def quant_token_fp4_cases() -> Iterator[Case]:
    for k, group in ((1152, 0), (3072, 16), (15360, 32)):
        types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", **SIZES}
        consts = {"TINY": 1e-30, "LARGEST": 12.0, "BLOCK_LARGEST": 169.0, "GROUP": group}
        consts |= quant_token_fp4.launch_options(k) | ROUND_EACH_STEP
        yield f"quant_token_fp4 K={k} group={group}", quant_token_fp4.quant_token_fp4_kernel, types, consts


def hadamard_cases() -> Iterator[Case]:
    for size, dtype in ((16, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)):
        pointer = POINTERS[dtype]
        types = {"x_ptr": pointer, "signs_ptr": "*i8", "h_ptr": pointer, "y_ptr": pointer}
        types |= {"ROWS": "i32", "BLOCKS": "i32", "factor": "fp32"}
        consts = {"HAS_SIGNS": True, "DOT": int8_linear.dot_dtype(dtype), "SIZE": size}
        consts |= hadamard.launch_options(size, dtype)
        yield f"hadamard b={size} {dtype}", hadamard.hadamard_kernel, types, consts


def compile_case(kernel: Any, types: dict[str, str], consts: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Compile one kernel and return its register, stack and shared memory use and its matrix instructions."""
    options = {name: consts.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in consts}
    amd = architecture.startswith("gfx")
    if amd and "PTX" in consts:
        consts["PTX"] = False
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in consts:
            signature[name] = "constexpr"
            constants[(index,)] = consts[name]
            continue
        signature[name] = types[name]
        # M is not specialised by the kernels; everything else is a multiple of 16 in every layer of a DiT.
        if name not in ("M", "ROWS", "BLOCKS", "TOKENS", "factor"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture), 32)
    compiled = triton.compile(source, target=target, options=options)
    found = inspect_amdgcn(compiled.asm["amdgcn"]) if amd else inspect_cubin(compiled.asm["cubin"])
    return {"shared": compiled.metadata.shared, **found}


def inspect_amdgcn(text: str) -> dict[str, Any]:
    """Bytes of scratch memory and matrix instructions of a kernel compiled for an AMD GPU."""
    scratch = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text).group(1))
    return {"stack": scratch, "mma": sorted(set(re.findall(r"\bv_mfma_[a-z0-9]+", text)))}


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
    return {**found, "mma": sorted(set(re.findall(r"\b(IGMMA|HGMMA|QGMMA|QMMA|IMMA|HMMA)\b", sass.stdout)))}


def main(files: str, architecture: str) -> None:
    for file in files.split("+"):
        for name, kernel, types, consts in globals()[f"{file}_cases"]():
            result = compile_case(kernel, types, consts, architecture)
            sys.stdout.write(json.dumps({"name": name, **result}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
