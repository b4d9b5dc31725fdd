"""Block-scaled FP4: the operand and the product against the formats that define them, and which form of it runs."""

import logging

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels import dispatch
from vdit_quant.kernels.block_fp4_linear import block_fp4_linear
from vdit_quant.kernels.block_scales import decode_blocks
from vdit_quant.kernels.quant_token_block_fp4 import quant_token_block_fp4
from vdit_quant.quantize.format import quantize_activation
from vdit_quant.quantize.layer import layer_ops, run_layer
from vdit_quant.quantize.spec import FormatSpec, LayerSpec
from vdit_quant.runtime.describe import reasons

FORMATS = {32: FormatSpec("mxfp4", 32), 16: FormatSpec("nvfp4", 16)}
grouped = pytest.mark.parametrize("group", list(FORMATS))


def rows(m: int, k: int) -> Tensor:
    """Normal numbers in blocks of very different sizes, with a block and a row of zeros."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(m, k, generator=g) * torch.exp(2 * torch.randn(m, k // 16, generator=g)).repeat_interleave(16, 1)
    x[0, :32] = 0
    x[-1] = 0
    return x


@grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_rounded_as_their_format_rounds(group: int, dtype: torch.dtype, relative_rms) -> None:
    x, spec = rows(33, 224).to(dtype), FORMATS[group]
    codes, block_scale, scale = quant_token_block_fp4(x, group)
    stored = spec.resolve().encode(x.float(), spec)
    assert torch.equal(codes, stored["weight"])
    assert torch.equal(block_scale, stored["weight_block_scale"])
    # the gain of a row of float32 is part of its scale
    assert relative_rms(decode_blocks(codes, block_scale) * scale[:, None], quantize_activation(x.float(), spec)) < 1e-6


@grouped
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e20, 1e38])
def test_the_projection_on_a_token_is_the_token(group: int, magnitude: float) -> None:
    x = (torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1) * magnitude
    codes, block_scale, scale = quant_token_block_fp4(x, group)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    wide = x.double() / magnitude
    rounded = decode_blocks(codes, block_scale).double() * (scale.double() / magnitude)[:, None]
    torch.testing.assert_close((wide * rounded).sum(1), wide.square().sum(1), rtol=1e-6, atol=0)


@grouped
def test_zero_rows_and_one_hot_rows(group: int) -> None:
    x = torch.zeros(3, 96)
    x[1, 4] = -3.0
    codes, block_scale, scale = quant_token_block_fp4(x, group)
    assert not codes[[0, 2]].any()
    assert (scale > 0).all()
    torch.testing.assert_close(decode_blocks(codes, block_scale) * scale[:, None], x)


@grouped
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_row_that_is_not_finite_says_so_in_its_scale(group: int, bad: float) -> None:
    x = torch.ones(2, 64)
    x[0, 3] = bad
    assert torch.isfinite(quant_token_block_fp4(x, group)[2]).tolist() == [False, True]


@grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_layer_is_its_decoded_weight_times_its_rounded_input(
    group: int, dtype: torch.dtype, with_bias: bool, relative_rms
) -> None:
    spec, g = FORMATS[group], torch.Generator().manual_seed(0)
    fmt = spec.resolve()
    stored = fmt.encode(torch.randn(40, 224, generator=g), spec)
    stored["weight_scale"] = stored["weight_scale"] * torch.linspace(0.9, 1.1, 40)  # as rows rescaled after rounding
    x, bias = rows(17, 224).to(dtype), torch.randn(40, generator=g) if with_bias else None
    y = run_layer(x, stored, LayerSpec(spec, spec), bias)
    want = quantize_activation(x.float(), spec).double() @ fmt.decode(stored, 224, spec).double().t()
    want = want if bias is None else want + bias.double()
    assert y.dtype == dtype
    assert relative_rms(y, want) < max(torch.finfo(dtype).eps, 1e-6)


@grouped
def test_only_activations_of_the_same_format_run_on_codes(group: int) -> None:
    spec, other = FORMATS[group], FORMATS[48 - group]
    assert spec.resolve().ops(LayerSpec(spec, spec)) == ("quant_token_block_fp4", "block_fp4_linear")
    assert [spec.resolve().ops(LayerSpec(spec, a)) for a in (None, other, FormatSpec("int8"))] == [(), (), ()]


@grouped
def test_empty_batch(group: int) -> None:
    found = quant_token_block_fp4(torch.zeros(0, 96), group)
    assert [t.shape for t in found] == [(0, 48), (0, 96 // group), (0,)]
    weight = quant_token_block_fp4(torch.ones(5, 96), group)
    assert block_fp4_linear(*found, *weight, None, torch.float32).shape == (0, 5)


def test_leaves_its_inputs_alone() -> None:
    args = (*quant_token_block_fp4(rows(3, 64), 32), *quant_token_block_fp4(rows(5, 64), 32), torch.ones(5))
    before = [t.clone() for t in args]
    block_fp4_linear(*args, torch.float32)
    assert all(torch.equal(t, old) for t, old in zip(args, before, strict=True))


@pytest.mark.parametrize(
    ("bad", "group"),
    [
        (torch.zeros(32), 32),
        (torch.zeros(2, 32, dtype=torch.int8), 32),
        (torch.zeros(2, 0), 16),
        (torch.zeros(2, 64), 64),
        (torch.zeros(2, 48), 32),
    ],
)
def test_refuses_other_shapes_dtypes_and_blocks(bad: Tensor, group: int) -> None:
    with pytest.raises(ValueError, match=r"quant_token_block_fp4: expected"):
        quant_token_block_fp4(bad, group)


def test_errors_name_the_op_what_was_expected_and_found() -> None:
    codes, block, scale = quant_token_block_fp4(rows(3, 64), 32)
    weight = quant_token_block_fp4(rows(5, 64), 32)
    for args, words in (
        ((codes.view(torch.int8), block, scale, *weight), r"codes torch.uint8 \[M, K/2\], found torch.int8"),
        ((codes, block[:, :1], scale, *weight), r"block_scale torch.uint8 \[3, K/32 or K/16\] for K=64"),
        ((codes, block, scale[:2], *weight), r"scale torch.float32 of shape \(3,\)"),
        ((codes, block, scale, weight[0][:, :5], *weight[1:]), r"weight torch.uint8 \[N, 32\]"),
        ((codes, block, scale, weight[0], weight[1][:, :1], weight[2]), r"weight_block_scale .* \(5, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"block_fp4_linear: expected {words}"):
            block_fp4_linear(*args, None, torch.float32)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch):
    """The Triton twin, as if there were a GPU, with nothing known of it."""
    pytest.importorskip("triton", reason="triton is not installed")
    twin = dispatch.twin("block_fp4_linear")
    monkeypatch.setattr(twin, "_native", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return twin


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (11, 0), (12, 1)])
def test_gpus_without_block_scaled_products_run_decoded_and_it_is_said(
    capability: tuple[int, int], file, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(dispatch, "_device_reason", lambda device: None)
    found = dispatch.explain("block_fp4_linear", "cuda:0", group=16)
    assert (found.backend, found.reason) == ("triton", "supported")
    assert found.note == (
        "decoded to bfloat16: block-scaled products need compute capability 10.0, 10.3, 12.0; "
        f"this GPU has {capability[0]}.{capability[1]}"
    )
    ops = {op for spec in FORMATS.values() for op in layer_ops(LayerSpec(spec, spec))}
    choices = [dispatch.explain(op, "cuda:0") for op in ops]
    assert reasons(choices) == [f"block_fp4_linear: triton, {found.note}"]


def test_gpus_with_them_run_them_once_they_have_given_the_right_numbers(file, monkeypatch: pytest.MonkeyPatch) -> None:
    device, answers = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    monkeypatch.setattr(file, "_compare", lambda *found: answers.append(found))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert file.native_limits(device, 32) == "not yet compared with the decoded form"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [file.native_limits(device, group) for group in (32, 32, 16)] == [None, None, None]
    assert answers == [(device, 32), (device, 16)]
    assert file.note("block_fp4_linear", device) is None


@grouped
def test_a_native_form_that_fails_or_errs_is_left(group: int, file, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def product(native: bool, operands: tuple[Tensor, ...], bias: None, out_dtype: torch.dtype) -> Tensor:
        return block_fp4_linear(*operands, bias, out_dtype)

    monkeypatch.setattr(file, "multiply", product)
    assert file._compare(torch.device("cpu"), group) is None
    monkeypatch.setattr(file, "multiply", lambda native, *args: product(native, *args) + native)
    assert "gave other numbers" in file._compare(torch.device("cpu"), group)

    def fail(native: bool, *args: object) -> None:
        raise RuntimeError("PassManager::run failed\nmore")

    monkeypatch.setattr(file, "multiply", fail)
    with caplog.at_level(logging.WARNING, logger="vdit_quant"):
        reason = file._compare(torch.device("cpu"), group)
    assert reason == "the block-scaled product failed: RuntimeError: PassManager::run failed"
    assert caplog.records[-1].getMessage() == f"block_fp4_linear runs decoded on cpu: {reason}"
