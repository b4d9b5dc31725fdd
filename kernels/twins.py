"""Where the implementations of each op are, beside its reference."""

TWINS = {
    "quant_token": "quant_token",
    "int8_linear": "int8_linear",
    "int8_weight_linear": "weight_linear",
    "int8_linear_add": "int8_linear_add",
    "int8_linear_low_rank": "int8_linear_low_rank",
    "norm_down": "low_rank_down",
    "act_down": "low_rank_down",
    "gate_add": "gate_add",
    "int4_to_int8": "int4_decode",
    "int4_linear": "int4_linear",
    "int4_weight_linear": "weight_linear",
    "packed_to_int8": "packed_decode",
    "codebook_to_int8": "codebook_decode",
    "quant_token_fp4": "quant_token_fp4",
    "quant_token_int4": "quant_token_int4",
    "quant_token_block_fp4": "quant_token_block_fp4",
    "block_fp4_linear": "block_fp4_linear",
    "hadamard": "hadamard",
    "norm_quant": "norm_quant",
    "norm_quant_fp8": "norm_quant",
    "norm_quant_fp4": "norm_quant",
    "norm_quant_fp4g16": "norm_quant",
    "norm_quant_fp4g32": "norm_quant",
    "norm_quant_fp4g64": "norm_quant",
    "norm_quant_fp4g128": "norm_quant",
    "gate_norm_quant": "norm_quant",
    "gate_norm_quant_fp8": "norm_quant",
    "act_quant": "act_quant",
    "head_norm_rope": "head_norm_rope",
    "round_columns": "round_columns",
    "attention": "attention",
    "quant_token_fp8": "fp8_linear",
    "fp8_linear": "fp8_linear",
}
"""Op name -> file in `_triton/`."""

LIBRARIES = {"fp8_linear": ("cublaslt", "scaled_mm"), "attention": ("sdpa", "sdpa")}
"""Op name -> (backend, module here) of a vendor's kernel, with a twin's functions: preferred in mode `auto`."""
