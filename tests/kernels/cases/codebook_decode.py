from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vdit_quant.kernels import codebook_decode as module
from vdit_quant.kernels.codebook_decode import BITS, codebook_to_int8
from vdit_quant.kernels.pack import pack_codes

from ._case import GROUPED_LAYERS, Compile, run_twin, twin

OPS = {"codebook_to_int8": codebook_to_int8}
WORDS = {1: "*i8", 2: "*i16", 4: "*i32"}
LIMITS = [
    ("codebook_to_int8", {"dtype": torch.uint8, "group": 64}, None),
    ("codebook_to_int8", {"dtype": torch.float64}, "dtype torch.float64 is not supported"),
    ("codebook_to_int8", {"group": 48}, "groups of 48 are not supported"),
]


def examples(a: Any) -> dict[str, list[tuple[Any, ...]]]:
    return {
        "codebook_to_int8": [
            (pack_codes(a.weight % 16, 4), a.weight[:3, :16, None], a.weight[:, 0].byte() % 3, a.group_scale, 64),
            (pack_codes(a.weight % 4, 2), a.weight[:1, :4, None], None, None, 64),
            (pack_codes(a.weight[:, :16] % 64, 6), a.weight.view(1, -1, 2)[:, :64], None, None, 32),
            (pack_codes(a.weight[:, :15].byte(), 8), a.weight.repeat(2, 1).view(1, 256, 4), None, None, 60),
        ]
    }


def compile_cases() -> Iterator[Compile]:
    file = twin("codebook_to_int8")
    for bits, length, group in ((8, 4, 0), (6, 2, 0), (4, 1, 0), (4, 1, 32), (2, 1, 0)):
        types = {"w_ptr": "*u8", "book_ptr": WORDS[length], "table_ptr": "*u8", "group_ptr": "*u8"}
        types["out_ptr"] = WORDS[length]
        types |= {"N": "i32", "C": "i32", "TABLES": "i32"}
        constants = {"BITS": bits, "HAS_TABLE": bits == 4, "GROUP": group, **file.launch_options(1152)}
        yield Compile(f"bits={bits} group={group}", file.codebook_to_int8_kernel, types, constants)
    for bits, length in ((8, 4), (6, 2), (4, 1), (2, 1)):
        types = {"w_ptr": "*u8", "book_ptr": WORDS[length], "table_ptr": "*u8", "out_ptr": WORDS[length]}
        types |= {"UNITS": "i32", "ROW_UNITS": "i32", "TABLES": "i32"}
        options = file.words_options((16 if bits == 6 else 32 // bits) * length // 4)
        constants = {"BITS": bits, "LENGTH": length, "HAS_TABLE": bits == 4, **options}
        yield Compile(f"words, bits={bits}", file.codebook_words_kernel, types, constants)


def _layers(entries: int, k: int, n: int, group: int | None, make_layer: Any, device: str = "cpu") -> Iterator[Any]:
    """Arguments for every length of an entry, with a table a row and with a single one."""
    a, g = make_layer(1, k, n, group, device=device), torch.Generator(device).manual_seed(k)
    for length in (1, 2, 4) if group is None else (1,):
        if k % length:
            continue
        book = torch.randint(-127, 128, (3, entries, length), generator=g, device=device).to(torch.int8)
        codes = torch.randint(0, entries, (n, k // length), generator=g, device=device)
        packed, table = pack_codes(codes, BITS[entries]), (a.weight[:, 0] % 3).to(torch.uint8)
        yield packed, book, table, a.group_scale, k
        yield packed, book[1:2], None, a.group_scale, k


@pytest.mark.parametrize("entries", BITS)
def interpreter_equals_reference(entries: int, make_layer) -> None:
    for k, n, group in [(4, 3, None), (60, 9, None), (64, 21, None), (1036, 10, None), (192, 40, 32), (576, 7, None)]:
        for args in _layers(entries, k, n, group, make_layer):
            assert torch.equal(run_twin("codebook_to_int8", *args), codebook_to_int8(*args))


def interpreter_every_level_with_every_group_scale() -> None:
    book = torch.tensor([-127, -12, -1, 0, 1, 2, 3, 4, 6, 8, 12, 42, 64, 100, 126, 127]).to(torch.int8).view(1, 16, 1)
    packed = pack_codes(torch.arange(16).repeat(256, 1), 4)
    args = (packed, book, None, torch.arange(256, dtype=torch.uint8)[:, None], 16)
    assert torch.equal(run_twin("codebook_to_int8", *args), codebook_to_int8(*args))


def interpreter_a_table_that_is_not_there_reads_the_last(make_layer) -> None:
    packed, book, _, _, k = next(iter(_layers(16, 60, 9, None, make_layer)))
    far, last = (torch.full((9,), value, dtype=torch.uint8) for value in (255, 2))
    want = codebook_to_int8(packed, book, last, None, k)
    assert torch.equal(codebook_to_int8(packed, book, far, None, k), want)
    assert torch.equal(run_twin("codebook_to_int8", packed, book, far, None, k), want)


@pytest.mark.parametrize("entries", BITS)
@pytest.mark.parametrize(("k", "n", "group"), GROUPED_LAYERS)
def cuda_equals_reference(k: int, n: int, group: int | None, entries: int, make_layer) -> None:
    for args in _layers(entries, k, n, group, make_layer, "cuda"):
        assert torch.equal(codebook_to_int8(*args), module._reference(*args))
