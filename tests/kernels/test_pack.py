import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_quant.kernels.pack import pack_int4, unpack_int4


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
