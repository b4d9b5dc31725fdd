"""Number formats against tables and rounding vectors that other implementations agree on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vdit_quant.kernels.block_scales import e4m3_bits, e4m3_scale, e8m0_bits, e8m0_scale
from vdit_quant.kernels.quant_token_fp4 import round_to_e2m1
from vdit_quant.quantize.block_float import LEVELS
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
    got, want = e4m3_scale(torch.arange(256).to(torch.uint8)), vectors["float8_e4m3fn_codes"]
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    assert torch.equal(got.nan_to_num(0), want.nan_to_num(0))


def test_e2m1_rounds_as_others_do(vectors: dict[str, Tensor]) -> None:
    x, want = vectors["float4_e2m1fn_x"], vectors["float4_e2m1fn_rounded"]
    assert torch.equal(round_to_e2m1(2 * x) / 2, want)


def test_e4m3_rounds_as_others_do(vectors: dict[str, Tensor]) -> None:
    x, want = vectors["float8_e4m3fn_x"], vectors["float8_e4m3fn_rounded"]
    use = x >= 0
    assert torch.equal(e4m3_scale(e4m3_bits(x[use])), want[use])


def test_mxfp4_encodes_as_others_do(vectors: dict[str, Tensor]) -> None:
    x, spec = vectors["mx_x"], FormatSpec("mxfp4", 32)
    fmt = spec.resolve()
    scales = fmt.fit(x, spec, clip=1.0)
    standard = fmt.dequantize(fmt.quantize(x, scales, spec), scales, spec)
    assert torch.equal(standard, vectors["mx_fp4_even"])
    assert (fmt.decode(fmt.encode(x, spec), x.shape[1], spec) - x).norm() < (standard - x).norm()


def test_block_scales_of_mxfp4_are_the_powers_of_two_below_a_quarter_of_the_largest_element() -> None:
    reach = torch.tensor([1.0, 3.999, 4.0, 6.0, 7.99, 8.0, 2.0**-120, 2.0**100])
    assert e8m0_scale(e8m0_bits(reach)).log2().tolist() == [-2, -1, 0, 0, 0, 1, -122, 98]


def test_every_e8m0_scale_is_exact_the_smallest_without_an_exponent_of_its_own_too() -> None:
    bits = torch.arange(255, dtype=torch.uint8)
    assert e8m0_scale(bits).tolist() == [2.0 ** (number - 127) for number in range(255)]


def test_elements_are_integers_of_seven_bits() -> None:
    for name, factor in (("e2m1", 16), ("e1m2", 32), ("e3m0", 4)):
        assert [int(v * factor) for v in VALUES[name]] == list(TABLES[name])
        assert TABLES[name][-1] <= 127


def test_levels_of_nf4_are_those_of_bitsandbytes(vectors: dict[str, Tensor]) -> None:
    assert torch.equal(torch.tensor(nf4.LEVELS), vectors["nf4"])


def test_nf4_is_stored_as_bitsandbytes_stores_it() -> None:
    library = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed, state = library.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    spec = FormatSpec("nf4", 64)
    tensors = spec.resolve().encode(weight, spec)
    assert torch.equal(tensors["weight"].flatten(), packed.flatten())
    assert torch.equal(tensors["weight_absmax"].flatten(), state.absmax.flatten())
    assert torch.equal(spec.resolve().decode(tensors, 128, spec), library.dequantize_4bit(packed, state))
