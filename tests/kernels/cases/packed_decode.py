from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import packed_decode as module
from vdit_quant.kernels.pack import WIDTHS, pack_bits
from vdit_quant.kernels.packed_decode import packed_to_int8

from ._case import EVERYWHERE, GROUPED, GROUPED_LAYERS, HOPPER, Compile, run_twin, twin

OPS = {"packed_to_int8": packed_to_int8}


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {
        "packed_to_int8": [
            (pack_bits(a.weight % 4 - 2, 2), a.group_scale, 64, 2, True),
            (pack_bits(a.weight % 8 - 4, 3), None, 64, 3, False),
            (pack_bits(a.weight[:, :61] % 64 - 32, 6), None, 61, 6, False),
        ]
    }


def compile_cases() -> Iterator[Compile]:
    file = twin("packed_to_int8")
    types = {"w_ptr": "*u8", "group_ptr": "*u8", "out_ptr": "*i8", "N": "i32", "K": "i32"}
    for bits, odd, group in ((2, True, 64), (3, False, 0), (3, False, 64), (6, False, 128)):
        constants = {"BITS": bits, "ODD": odd, "GROUP": group, **file.launch_options(1152)}
        on = EVERYWHERE if (bits, group) == (3, 64) else HOPPER
        yield Compile(f"bits={bits} group={group}", file.packed_to_int8_kernel, types, constants, on)


def _packed(a: Any, bits: int) -> torch.Tensor:
    return pack_bits(a.weight % (1 << bits) - (1 << (bits - 1)), bits)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def interpreter_equals_reference(bits: int, odd: bool, make_layer) -> None:
    for m, k, n, group in [(1, 1, 3, None), (1, 61, 9, None), (1, 1037, 10, None), *GROUPED]:
        a = make_layer(m, k, n, group)
        args = (_packed(a, bits), a.group_scale, k, bits, odd)
        assert torch.equal(run_twin("packed_to_int8", *args), packed_to_int8(*args))


@pytest.mark.parametrize(("bits", "odd"), [(2, False), (2, True), (3, False), (6, False)])
def interpreter_every_code_with_every_group_scale(bits: int, odd: bool) -> None:
    codes = (torch.arange(64, dtype=torch.int8) % (1 << bits) - (1 << (bits - 1))).repeat(256, 1)
    args = (pack_bits(codes, bits), torch.arange(256, dtype=torch.uint8)[:, None], 64, bits, odd)
    assert torch.equal(run_twin("packed_to_int8", *args), packed_to_int8(*args))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("k", "n", "group"), GROUPED_LAYERS)
def cuda_equals_reference(k: int, n: int, group: int | None, bits: int, make_layer) -> None:
    a = make_layer(1, k, n, group, device="cuda")
    for odd in (False, True):
        args = (_packed(a, bits), a.group_scale, k, bits, odd)
        assert torch.equal(packed_to_int8(*args), module._reference(*args))
