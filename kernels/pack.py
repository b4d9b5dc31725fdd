"""Packing of 4-bit integers, two per byte: exact inverse pairs in plain torch."""

import torch
from torch import Tensor


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
