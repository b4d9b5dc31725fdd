"""torch.library's own checks (schema, fake tensors, aliasing, torch.compile) on every op."""

from collections.abc import Callable

import pytest
import torch

from vdit_quant.kernels.act_quant import ACTS, act_quant
from vdit_quant.kernels.attention import attention
from vdit_quant.kernels.codebook_decode import codebook_to_int8
from vdit_quant.kernels.dispatch import TWINS
from vdit_quant.kernels.fp8_linear import fp8_linear, quant_token_fp8
from vdit_quant.kernels.hadamard import hadamard
from vdit_quant.kernels.head_norm_rope import head_norm_rope
from vdit_quant.kernels.int4_linear import int4_linear, int4_to_int8, int4_weight_linear
from vdit_quant.kernels.int8_linear import int8_linear, int8_weight_linear
from vdit_quant.kernels.int8_linear_add import int8_linear_add
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank
from vdit_quant.kernels.norm_quant import gate_norm_quant, gate_norm_quant_fp8, norm_quant, norm_quant_fp8
from vdit_quant.kernels.pack import pack_bits, pack_codes
from vdit_quant.kernels.packed_decode import packed_to_int8
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.kernels.quant_token_fp4 import quant_token_fp4

E4M3 = torch.float8_e4m3fn
SIGNS = torch.ones(64, dtype=torch.int8)
REGULAR = ("rms", 1e-5, 64, "regular")


def modulation(a) -> list[torch.Tensor]:
    """Shift and scale as adaLN gives them: two chunks of one row."""
    return list(a.x[:1].repeat(1, 2).chunk(2, dim=1))


CASES: dict[str, tuple[Callable[..., object], Callable[..., list[tuple[object, ...]]]]] = {
    "quant_token": (quant_token, lambda a: [(a.x,), (a.x.bfloat16(),)]),
    "int8_linear": (
        int8_linear,
        lambda a: [
            (a.codes, a.scale, a.weight, a.weight_scale, a.bias, torch.float32),
            (a.codes, a.scale, a.weight, a.weight_scale, None, torch.bfloat16),
        ],
    ),
    "int8_weight_linear": (int8_weight_linear, lambda a: [(a.x, a.weight, a.weight_scale, a.bias)]),
    "int8_linear_add": (
        int8_linear_add,
        lambda a: [
            (a.codes, a.scale, a.weight, a.weight_scale, a.bias, a.x[:, :8], a.x[:1, 8:16]),
            (a.codes, a.scale, a.weight, a.weight_scale, None, a.x[:, :8].bfloat16(), None),
        ],
    ),
    "int8_linear_low_rank": (
        int8_linear_low_rank,
        lambda a: [
            (a.codes, a.scale, a.weight, a.weight_scale, a.bias, a.x[:, :4], a.x[0].view(8, 8)[:, :4], torch.bfloat16),
            (a.codes, a.scale, a.weight, a.weight_scale, None, a.x[:, :4], a.x[0].view(8, 8)[:, :4], torch.float32),
        ],
    ),
    "int4_to_int8": (int4_to_int8, lambda a: [(a.packed, a.group_scale, 64), (a.packed, None, 64)]),
    "int4_linear": (
        int4_linear,
        lambda a: [(a.codes, a.scale, a.packed, a.weight_scale, a.group_scale, a.bias, torch.bfloat16)],
    ),
    "int4_weight_linear": (
        int4_weight_linear,
        lambda a: [(a.x, a.packed, a.weight_scale, a.group_scale, None)],
    ),
    "packed_to_int8": (
        packed_to_int8,
        lambda a: [
            (pack_bits(a.weight % 4 - 2, 2), a.group_scale, 64, 2, True),
            (pack_bits(a.weight % 8 - 4, 3), None, 64, 3, False),
            (pack_bits(a.weight[:, :61] % 64 - 32, 6), None, 61, 6, False),
        ],
    ),
    "quant_token_fp8": (quant_token_fp8, lambda a: [(a.x,), (a.x.bfloat16(),)]),
    "fp8_linear": (
        fp8_linear,
        lambda a: [
            (a.x.to(E4M3), a.scale, a.weight.to(E4M3), a.weight_scale, a.bias, torch.float32),
            (a.x.to(E4M3), a.scale, a.weight.to(E4M3), a.weight_scale, None, torch.bfloat16),
        ],
    ),
    "codebook_to_int8": (
        codebook_to_int8,
        lambda a: [
            (pack_codes(a.weight % 16, 4), a.weight[:3, :16, None], a.weight[:, 0].byte() % 3, a.group_scale, 64),
            (pack_codes(a.weight[:, :16] % 64, 6), a.weight.view(1, -1, 2)[:, :64], None, None, 32),
            (pack_codes(a.weight[:, :15].byte(), 8), a.weight.repeat(2, 1).view(1, 256, 4), None, None, 60),
        ],
    ),
    "quant_token_fp4": (quant_token_fp4, lambda a: [(a.x, 0), (a.x.bfloat16(), 16)]),
    "hadamard": (
        hadamard,
        lambda a: [(a.x, torch.ones(64, dtype=torch.int8), 16, "sylvester"), (a.x, None, 64, "regular")],
    ),
    "norm_quant": (
        norm_quant,
        lambda a: [
            (a.x, [], [], [], "layer", 1e-6, 0, ""),
            (a.x.bfloat16(), modulation(a), [a.x[0], a.x[1]], [a.x[2], SIGNS], "layer", 1e-6, 16, "sylvester"),
        ],
    ),
    "norm_quant_fp8": (norm_quant_fp8, lambda a: [(a.x, modulation(a), [a.x[0]], [SIGNS], *REGULAR)]),
    "gate_norm_quant": (
        gate_norm_quant,
        lambda a: [
            ([a.x, a.x.bfloat16()], [], [], [a.x[0]], *REGULAR),
            ([a.x.half(), a.x, a.x[:1]], modulation(a), [], [], "layer", 1e-6, 0, ""),
        ],
    ),
    "gate_norm_quant_fp8": (gate_norm_quant_fp8, lambda a: [([a.x, a.x], [], [], [], *REGULAR)]),
    "act_quant": (
        act_quant,
        lambda a: [
            *((a.x, act, None, None, 0, "") for act in ACTS),
            (a.x.bfloat16(), "gelu_tanh", a.x[0], SIGNS, 16, "regular", "fp8"),
            (a.x.repeat(1, 3)[:, 64:], "swiglu", None, None, 64, "regular"),
        ],
    ),
    "head_norm_rope": (
        head_norm_rope,
        lambda a: [
            (
                a.x.view(3, 1, 64)[..., :48],
                [a.x[0, :8]] * 2,
                a.x.view(3, 1, 64)[..., :48],
                [],
                [a.x[:2, :8]] * 2,
                2,
                1e-6,
            ),
            (a.x.view(1, 3, 64)[..., :48], [a.x[0, :16]] * 2, None, [], [], 2, 1e-6),
        ],
    ),
    "attention": (
        attention,
        lambda a: [(a.x.view(1, 3, 4, 16), a.x.view(1, 3, 4, 16)[:, :2], a.x.view(1, 3, 4, 16)[:, 1:], 0.25)],
    ),
}

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_every_op_has_a_case() -> None:
    assert set(CASES) == set(TWINS)


@pytest.mark.parametrize("op", sorted(CASES))
def test_opcheck(op: str, make_layer) -> None:
    call, samples = CASES[op]
    for args in samples(make_layer(3, 64, 8, 32)):
        # The schema check compares tensors with operations that float8 does not have.
        floats8 = any(isinstance(t, torch.Tensor) and t.dtype == E4M3 for t in args) or op == "quant_token_fp8"
        torch.library.opcheck(call.overload, args, test_utils=CHECKS[1:] if floats8 else CHECKS)


def test_fake_tensors_are_checked_too(make_layer) -> None:
    a = make_layer(3, 64, 8)
    with pytest.raises(ValueError, match="int8_linear: expected weight"):
        int8_linear(*(t.to("meta") for t in (a.codes, a.scale, a.weight[:, :9], a.weight_scale)), None, torch.float32)
