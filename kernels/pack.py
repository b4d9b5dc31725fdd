"""Packing of small integers without gaps: exact inverse pairs in plain torch."""

import torch
from torch import Tensor

WIDTHS = (2, 3, 6)
"""What `pack_bits` packs; 4 bits have the simpler `pack_int4`."""

CODE_WIDTHS = (2, 4, 6, 8)
"""What `pack_codes` packs."""


def pack_int4(q: Tensor) -> Tensor:
    """byte[j] = (q[2j] & 15) | (q[2j+1] & 15) << 4; an odd K gets a zero nibble at the end.

    q: integer [..., K], values in [-8, 7]
    returns: uint8 [..., ceil(K/2)], even k in the low nibble, two's complement
    Raises ValueError for a non-integer dtype, a scalar, or values outside [-8, 7].
    """
    if q.dtype.is_floating_point or q.dtype.is_complex or q.dtype == torch.bool or q.dim() == 0:
        raise ValueError(f"pack_int4: expected an integer tensor [..., K], found {q.dtype} of shape {tuple(q.shape)}")
    if q.numel() and not q.is_meta and (int(q.min()) < -8 or int(q.max()) > 7):
        raise ValueError(f"pack_int4: expected values in [-8, 7], found {int(q.min())} to {int(q.max())}")
    nibble = (q.to(torch.int16) & 15).to(torch.uint8)
    if nibble.shape[-1] % 2:
        nibble = torch.nn.functional.pad(nibble, (0, 1))
    return nibble[..., 0::2] | (nibble[..., 1::2] << 4)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """q[2j] = low nibble of byte[j], q[2j+1] = high nibble, both sign-extended.

    packed: uint8 [..., ceil(k/2)]
    returns: int8 [..., k], contiguous
    Raises ValueError when the dtype is not uint8 or the last dimension is not ceil(k/2).
    """
    if packed.dtype != torch.uint8 or packed.dim() == 0:
        raise ValueError(f"unpack_int4: expected uint8 [..., K/2], found {packed.dtype} {tuple(packed.shape)}")
    if packed.shape[-1] != (k + 1) // 2:
        raise ValueError(f"unpack_int4: {k} values need {(k + 1) // 2} bytes per row, found {packed.shape[-1]}")
    signed = packed.view(torch.int8)
    # Shifting left then arithmetically right copies the nibble's sign bit into the upper half.
    both = torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)
    return both if both.shape[-1] == k else both[..., :k].contiguous()


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Eight codes in `bits` bytes: code j is the bits [j * bits, (j + 1) * bits) of a little-endian word.

    codes: integer [..., K], values in [-2^(bits-1), 2^(bits-1) - 1]; K is filled up to a multiple of 8 with zeros
    bits: 2, 3 or 6
    returns: uint8 [..., bits * ceil(K/8)], two's complement
    Raises ValueError for another width, a non-integer dtype, a scalar, or values that do not fit.
    """
    _check_bits("pack_bits", bits)
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool or codes.dim() == 0:
        found = f"{codes.dtype} of shape {tuple(codes.shape)}"
        raise ValueError(f"pack_bits: expected an integer tensor [..., K], found {found}")
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if codes.numel() and not codes.is_meta and (int(codes.min()) < low or int(codes.max()) > high):
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(f"pack_bits: expected values in [{low}, {high}], found {found}")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    word = torch.zeros_like(padded[..., ::8], dtype=torch.int64)
    for j in range(8):
        word |= (padded[..., j::8].long() & ((1 << bits) - 1)) << (j * bits)
    return torch.stack([((word >> (8 * i)) & 255).to(torch.uint8) for i in range(bits)], dim=-1).flatten(-2)


def unpack_bits(packed: Tensor, k: int, bits: int) -> Tensor:
    """The codes that `pack_bits` packed.

    packed: uint8 [..., bits * ceil(k/8)]
    returns: int8 [..., k], contiguous
    Raises ValueError for another width, a dtype that is not uint8, or a last dimension that does not fit.
    """
    _check_bits("unpack_bits", bits)
    if packed.dtype != torch.uint8 or packed.dim() == 0:
        raise ValueError(f"unpack_bits: expected uint8 [..., bytes], found {packed.dtype} {tuple(packed.shape)}")
    width = (k + 7) // 8 * bits
    if packed.shape[-1] != width:
        raise ValueError(f"unpack_bits: {k} values need {width} bytes per row, found {packed.shape[-1]}")
    word = packed[..., ::bits].long()
    for i in range(1, bits):
        word |= packed[..., i::bits].long() << (8 * i)
    # Shifting left to the top then arithmetically right copies the code's sign bit into the upper bits.
    codes = [((word << (64 - (j + 1) * bits)) >> (64 - bits)).to(torch.int8) for j in range(8)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :k].contiguous()


def _check_bits(what: str, bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"{what}: expected {', '.join(map(str, WIDTHS))} bits, found {bits}")


def code_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes without gaps: code j is the bits [j * bits, (j + 1) * bits) of the row, little-endian.

    codes: integer [..., C], values in [0, 2^bits - 1]
    bits: 2, 4, 6 or 8
    returns: uint8 [..., code_bytes(C, bits)], the last byte filled up with zeros
    Raises ValueError for another width, a non-integer dtype, a scalar, or values that do not fit.
    """
    _check_code_width("pack_codes", bits)
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool or codes.dim() == 0:
        found = f"{codes.dtype} of shape {tuple(codes.shape)}"
        raise ValueError(f"pack_codes: expected an integer tensor [..., C], found {found}")
    if codes.numel() and not codes.is_meta and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(f"pack_codes: expected values in [0, {(1 << bits) - 1}], found {found}")
    width = code_bytes(codes.shape[-1], bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).long()
    word = torch.zeros_like(padded[..., ::8])
    for j in range(8):
        word |= padded[..., j::8] << (j * bits)
    row = torch.stack([((word >> (8 * i)) & 255).to(torch.uint8) for i in range(bits)], dim=-1).flatten(-2)
    return row[..., :width].contiguous()


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """The codes that `pack_codes` packed.

    packed: uint8 [..., code_bytes(count, bits)]
    returns: uint8 [..., count], contiguous
    Raises ValueError for another width, a dtype that is not uint8, or a last dimension that does not fit.
    """
    _check_code_width("unpack_codes", bits)
    width = code_bytes(count, bits)
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != width:
        found = f"{packed.dtype} of shape {tuple(packed.shape)}"
        raise ValueError(f"unpack_codes: {count} codes need uint8 [..., {width}], found {found}")
    if bits == 8:
        return packed.contiguous()
    first = torch.arange(count, device=packed.device) * bits
    wide = torch.nn.functional.pad(packed, (0, 1)).to(torch.int32)  # a code may end in the next byte
    word = wide[..., first // 8] | (wide[..., first // 8 + 1] << 8)
    return ((word >> (first % 8).to(torch.int32)) & ((1 << bits) - 1)).to(torch.uint8)


def _check_code_width(what: str, bits: int) -> None:
    if bits not in CODE_WIDTHS:
        raise ValueError(f"{what}: expected {', '.join(map(str, CODE_WIDTHS))} bits, found {bits}")
