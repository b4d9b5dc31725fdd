"""What the cases of the fused producers share: both end in a `Transform`."""

from typing import Any

import torch
from torch import Tensor

from vdit_quant.kernels.transform import FORMS, Transform

from ._case import relative_rms, twin

PLAIN = Transform(None, None, 0, "", torch.int8)
# bfloat16 is read as pairs, see `rows.readable`
TYPES = {"x_ptr": "*i32", "pre_scale_ptr": "*fp32", "signs_ptr": "*i8", "pairs_ptr": "*i16", "scale_ptr": "*fp32"}
TYPES |= {"hadamard_ptr": "*fp16", "x_stride": "i32", "M": "i32"}

# For the interpreter: rotations; one tile, two, and two with a masked tail, whose chunks are spread over lanes.
SIZES = [(0, ""), (16, "regular"), (32, "sylvester"), (64, "regular")]
WIDTHS = [64, 192, 448]
# For a GPU.
ROTATIONS = [(0, ""), (16, "regular"), (64, "sylvester"), (128, "sylvester")]


def tile_constants(k: int, block_size: int, out: str = "int8", amd: bool = False) -> dict[str, Any]:
    """Tiles for rows of k channels; with a rotation also a channel scale and signs."""
    vectors = (torch.ones(k), torch.ones(k, dtype=torch.int8)) if block_size else (None, None)
    return dict(twin("act_quant").tile_options(k, Transform(*vectors, block_size, "sylvester", *FORMS[out]), amd))


def transform_of(
    a: Any, size: int, kind: str, k: int | None = None, pre_scale: bool = True, signs: bool = True, out: str = "int8"
) -> Transform:
    """A transform made of the first k (None: all) channels of a random layer; signs only with a rotation."""
    scale = a.x[0, :k].float().abs() + 0.1 if pre_scale else None
    flips = (a.codes[0, :k] | 1).sign().contiguous() if signs and size else None
    return Transform(scale, flips, size, kind, *FORMS[out])


def vectors_of(transform: Transform) -> list[Tensor]:
    """A transform's vectors as `norm_quant` takes them."""
    return [t for t in (transform.pre_scale, transform.signs) if t is not None]


def few_tokens(monkeypatch: Any) -> None:
    """Programs of two tokens: the interpreter runs maxima that keep nan element by element."""
    from vdit_quant.kernels._triton import rows

    options = rows.launch_options
    monkeypatch.setattr(rows, "launch_options", lambda *sizes: {**options(*sizes), "R": 2})


def assert_codes_nearly_equal(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Scales agree; codes differ by one at most, and rarely."""
    (codes, scale), (want_codes, want_scale) = got, want
    assert codes.dtype == want_codes.dtype == torch.int8
    torch.testing.assert_close(scale, want_scale, rtol=tolerance, atol=0)
    difference = (codes.int() - want_codes.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.05


def assert_fp4_nearly_equal(got: Any, want: Any, tolerance: float = 1e-5, rare: float = 0.01) -> None:
    """Scales agree and nearly all codes do; the others are one element further, or in a block with another scale."""
    (codes, scale), (want_codes, want_scale) = got, want
    assert codes.dtype == want_codes.dtype == torch.int8
    torch.testing.assert_close(scale, want_scale, rtol=tolerance, atol=0)
    off = codes != want_codes
    assert off.float().mean() < rare
    step = want_codes.abs().amax(1, keepdim=True) / 3 + 1
    assert ((codes.int() - want_codes.int()).abs() <= step).all()


def assert_codes_agree(got: Any, want: Any) -> None:
    """Codes differ by one at most; what they stand for is as close to `want` as its own rounding."""
    (codes, scale), (want_codes, want_scale) = got, want
    torch.testing.assert_close(scale, want_scale, rtol=1e-2, atol=0)
    assert (codes.int() - want_codes.int()).abs().max() <= 1
    assert relative_rms(codes.double() * scale.double()[:, None], want_codes.double() * want_scale[:, None]) < 1.2e-2
