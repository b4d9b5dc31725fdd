import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_quant.kernels.pack import (
    CODE_WIDTHS,
    WIDTHS,
    pack_bits,
    pack_codes,
    pack_int4,
    unpack_bits,
    unpack_codes,
    unpack_int4,
)


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(0, 5), max_size=2), k=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(shape: list[int], k: int, seed: int) -> None:
    q = torch.randint(-8, 8, (*shape, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, (k + 1) // 2)
    assert torch.equal(unpack_int4(packed, k), q)


def test_pack_inverts_unpack_for_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_int4(unpack_int4(packed, 128)), packed)


def test_even_k_is_the_low_nibble_and_padding_is_zero() -> None:
    assert pack_int4(torch.tensor([1, -1, -8])).tolist() == [0xF1, 0x08]


@pytest.mark.parametrize("bad", [torch.tensor([8]), torch.tensor([-9]), torch.tensor([0.5]), torch.tensor(3)])
def test_pack_refuses_what_does_not_fit(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pack_int4"):
        pack_int4(bad)


def test_unpack_refuses_wrong_widths_and_dtypes() -> None:
    with pytest.raises(ValueError, match="3 bytes per row, found 2"):
        unpack_int4(torch.zeros(1, 2, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="uint8"):
        unpack_int4(torch.zeros(1, 2, dtype=torch.int8), 4)


@settings(deadline=None, max_examples=80)
@given(
    bits=st.sampled_from(WIDTHS),
    shape=st.lists(st.integers(0, 5), max_size=2),
    k=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_unpack_bits_inverts_pack_bits(bits: int, shape: list[int], k: int, seed: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (*shape, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, bits * ((k + 7) // 8))
    unpacked = unpack_bits(packed, k, bits)
    assert unpacked.dtype == torch.int8
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from(WIDTHS), blocks=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_pack_bits_inverts_unpack_bits(bits: int, blocks: int, seed: int) -> None:
    packed = torch.randint(0, 256, (3, bits * blocks), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(pack_bits(unpack_bits(packed, 8 * blocks, bits), bits), packed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_codes_are_a_little_endian_stream(bits: int) -> None:
    half = 1 << (bits - 1)
    codes = [(5 * j + 1) % (2 * half) - half for j in range(8)]
    word = sum((code % (2 * half)) << (j * bits) for j, code in enumerate(codes))
    assert bytes(pack_bits(torch.tensor(codes), bits).tolist()) == word.to_bytes(bits, "little")
    assert pack_bits(torch.tensor([-1]), bits).tolist() == [2 * half - 1] + [0] * (bits - 1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_bits_refuses_what_does_not_fit(bits: int) -> None:
    half = 1 << (bits - 1)
    for bad in (torch.tensor([half]), torch.tensor([-half - 1]), torch.tensor([0.5]), torch.tensor(1)):
        with pytest.raises(ValueError, match="pack_bits"):
            pack_bits(bad, bits)
    with pytest.raises(ValueError, match=f"9 values need {2 * bits} bytes per row, found {bits}"):
        unpack_bits(torch.zeros(1, bits, dtype=torch.uint8), 9, bits)
    with pytest.raises(ValueError, match="uint8"):
        unpack_bits(torch.zeros(1, bits, dtype=torch.int8), 8, bits)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_other_widths_are_refused(bits: int) -> None:
    for call in (
        lambda: pack_bits(torch.zeros(8, dtype=torch.int8), bits),
        lambda: unpack_bits(torch.zeros(8), 8, bits),
    ):
        with pytest.raises(ValueError, match=f"expected 2, 3, 6 bits, found {bits}"):
            call()


@pytest.mark.parametrize("bits", CODE_WIDTHS)
@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 4), count=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_codes_of_every_width_come_back_without_a_wasted_byte(bits: int, n: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, count), generator=generator).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (n, -(-count * bits // 8))
    assert torch.equal(unpack_codes(packed, count, bits), codes)


def test_codes_lie_in_little_endian_order() -> None:
    assert pack_codes(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack_codes(torch.tensor([1, 2, 3, 63]), 6).tolist() == [0x81, 0x30, 0xFC]


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected values in \[0, 63\], found 0 to 64"):
        pack_codes(torch.tensor([0, 64]), 6)
    with pytest.raises(ValueError, match="2, 4, 6, 8 bits, found 5"):
        pack_codes(torch.tensor([0]), 5)
    with pytest.raises(ValueError, match=r"3 codes need uint8 \[..., 3\]"):
        unpack_codes(torch.zeros(2, 2, dtype=torch.uint8), 3, 6)
