"""Number formats against tables and rounding vectors that other implementations agree on."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vdit_quant.kernels.block_scales import e4m3_bits, e4m3_scale, e8m0_bits, e8m0_scale
from vdit_quant.kernels.fp8_linear import quant_token_fp8
from vdit_quant.kernels.quant_token_fp4 import round_to_e2m1
from vdit_quant.quantize.block_float import LEVELS
from vdit_quant.quantize.format import ScalarFormat
from vdit_quant.quantize.formats import nf4
from vdit_quant.quantize.minifloat import TABLES, VALUES, codebook
from vdit_quant.quantize.spec import FormatSpec


@pytest.fixture(scope="module")
def vectors(root: Path) -> dict[str, Tensor]:
    return load_file(root / "tests/data/number_formats.safetensors")


def test_every_code_of_e2m1_decodes_to_its_value(vectors: dict[str, Tensor]) -> None:
    want = vectors["float4_e2m1fn_codes"]
    assert torch.equal(codebook(("e2m1",))[0, :, 0].float() / 16, want)
    fmt = FormatSpec("mxfp4", 32).resolve()
    assert torch.equal(torch.tensor(LEVELS)[fmt.index_of(torch.arange(16, dtype=torch.int8))], want.abs() * want.sign())


def test_every_code_of_e4m3_decodes_to_its_value(vectors: dict[str, Tensor]) -> None:
    codes, want = torch.arange(256).to(torch.uint8), vectors["float8_e4m3fn_codes"]
    spec, stored = FormatSpec("fp8"), codes.view(1, -1).view(torch.float8_e4m3fn)
    by_format = spec.resolve().decode({"weight": stored, "weight_scale": torch.ones(1)}, 256, spec)[0]
    for got in (e4m3_scale(codes), by_format):
        assert torch.equal(torch.isnan(got), torch.isnan(want))
        assert torch.equal(got.nan_to_num(0), want.nan_to_num(0))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "e2m1"])
def test_e2m1_rounds_as_others_do(vectors: dict[str, Tensor], name: str) -> None:
    x, want = vectors["float4_e2m1fn_x"], vectors["float4_e2m1fn_rounded"]
    assert torch.equal(round_to_e2m1(2 * x) / 2, want)
    fmt, spec, scales = FormatSpec(name).resolve(), FormatSpec(name), {"weight_scale": torch.ones(1)}
    assert isinstance(fmt, ScalarFormat)
    if name == "e2m1":  # its table is in sixteenths
        scales = {"weight_scale": torch.ones(1) / 16, "weight_codebook": codebook(("e2m1",))}
    else:
        scales["weight_block_scale"] = torch.tensor([[127 if name == "mxfp4" else 0x38]], dtype=torch.uint8)
    got = fmt.dequantize(fmt.quantize(x[None], scales, spec), scales, spec)[0]
    tie = torch.isin(x.abs(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
    assert 0 < int(tie.sum()) < 0.1 * len(x)
    assert torch.equal(got[~tie], want[~tie])
    assert torch.equal((got - x)[tie].abs(), (want - x)[tie].abs())  # the weight format takes the lower of the two
    assert name == "e2m1" or torch.equal(got, want)


def test_e4m3_rounds_as_others_do(vectors: dict[str, Tensor]) -> None:
    x, want = vectors["float8_e4m3fn_x"], vectors["float8_e4m3fn_rounded"]
    assert (x < 0).any()
    use = x >= 0  # block scales have no sign
    assert torch.equal(e4m3_scale(e4m3_bits(x[use])), want[use])
    fmt, spec, scales = FormatSpec("fp8").resolve(), FormatSpec("fp8"), {"weight_scale": torch.ones(1)}
    assert isinstance(fmt, ScalarFormat)
    assert torch.equal(fmt.dequantize(fmt.quantize(x[None], scales, spec), scales, spec)[0], want)


def test_fp8_encodes_what_its_range_covers_as_others_do(vectors: dict[str, Tensor]) -> None:
    """Rows whose largest element is that of the format have a scale of 1."""
    x, want, spec = vectors["float8_e4m3fn_x"], vectors["float8_e4m3fn_rounded"], FormatSpec("fp8")
    use = x.abs() <= 448
    x, want = torch.cat((x[use], x.new_tensor([448.0])))[None], torch.cat((want[use], x.new_tensor([448.0])))[None]
    fmt = spec.resolve()
    tensors = fmt.encode(torch.cat((x, -x, 4 * x)), spec)
    assert tensors["weight_scale"].tolist() == [1.0, 1.0, 4.0]
    assert torch.equal(fmt.decode(tensors, x.shape[1], spec), torch.cat((want, -want, 4 * want)))
    assert torch.equal(tensors["weight"][0].float(), want[0])
    codes, scale = quant_token_fp8(x)
    assert scale.tolist() == [1.0]
    assert torch.equal(codes.float(), want)


@pytest.mark.parametrize("ties", ["even", "nearest"])
def test_mxfp4_encodes_as_others_do(vectors: dict[str, Tensor], ties: str) -> None:
    """Both ways to round what lies in the middle: nothing here does."""
    x, spec = vectors["mx_x"], FormatSpec("mxfp4", 32)
    assert x.shape == (64, 256)
    fmt = spec.resolve()
    assert isinstance(fmt, ScalarFormat)
    scales = fmt.fit(x, spec, clip=1.0)
    codes = fmt.quantize(x, scales, spec)
    standard = fmt.dequantize(codes, scales, spec)
    assert torch.equal(standard, vectors[f"mx_fp4_{ties}"])
    assert torch.equal(fmt.decode(fmt.store(codes, scales), x.shape[1], spec), standard)
    assert (fmt.decode(fmt.encode(x, spec), x.shape[1], spec) - x).norm() < (standard - x).norm()


def test_block_scales_of_mxfp4_are_the_powers_of_two_below_a_quarter_of_the_largest_element() -> None:
    reach = torch.tensor([1.0, 3.999, 4.0, 6.0, 7.99, 8.0, 2.0**-120, 2.0**100])
    assert e8m0_scale(e8m0_bits(reach)).log2().tolist() == [-2, -1, 0, 0, 0, 1, -122, 98]


def test_every_e8m0_scale_is_exact_the_smallest_without_an_exponent_of_its_own_too() -> None:
    *scales, last = e8m0_scale(torch.arange(256).to(torch.uint8)).tolist()
    assert scales == [2.0 ** (number - 127) for number in range(255)]
    assert math.isnan(last)


def test_elements_are_integers_of_seven_bits() -> None:
    for name, factor in (("e2m1", 16), ("e1m2", 32), ("e3m0", 4)):
        assert [int(v * factor) for v in VALUES[name]] == list(TABLES[name])
        assert TABLES[name][-1] <= 127


def test_levels_of_nf4_are_those_of_bitsandbytes(vectors: dict[str, Tensor]) -> None:
    assert torch.equal(torch.tensor(nf4.LEVELS), vectors["nf4"])
    codes, spec = torch.arange(64, dtype=torch.int8)[None] % 16, FormatSpec("nf4", 64)
    decoded = nf4.FORMAT.decode(nf4.FORMAT.store(codes, {"weight_absmax": torch.ones(1, 1)}), 64, spec)
    assert torch.equal(decoded, vectors["nf4"].repeat(4)[None])


def test_nf4_is_stored_as_bitsandbytes_stores_it() -> None:
    library = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed, state = library.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    spec = FormatSpec("nf4", 64)
    tensors = spec.resolve().encode(weight, spec)
    assert torch.equal(tensors["weight"].flatten(), packed.flatten())
    assert torch.equal(tensors["weight_absmax"].flatten(), state.absmax.flatten())
    assert torch.equal(spec.resolve().decode(tensors, 128, spec), library.dequantize_4bit(packed, state))
