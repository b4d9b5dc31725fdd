import pytest
import torch

from vdit_quant.kernels.act_quant import ACTS, GATED, activated
from vdit_quant.kernels.low_rank_down import act_down, norm_down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_matches_float64(kind: str, dtype: torch.dtype, make_layer, relative_rms) -> None:
    k, tokens = 72, 3
    x, b, down = (
        make_layer(2 * tokens, k, 1, dtype=dtype).x,
        make_layer(2, 2 * k, 1).x,
        make_layer(5, k, 2).x.bfloat16(),
    )
    scale = b[0, :k].abs() + 0.5
    y = x.double() - (x.double().mean(1, keepdim=True) if kind == "layer" else 0)
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * x[0].double()
    shift, factor = (t.double().repeat_interleave(tokens, 0) for t in b.chunk(2, dim=1))
    want = ((y * (1 + factor) + shift) * scale.double()) @ down.double().t()
    got = norm_down(x, list(b.chunk(2, dim=1)), [x[0]], scale, down, kind, 1e-5)
    assert got.dtype == dtype
    assert relative_rms(got, want) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("act", ACTS)
def test_act_matches_float64(act: str, make_layer, relative_rms) -> None:
    x, prefix, down = make_layer(7, 48, 1).x, make_layer(7, 8, 2).x, make_layer(5, 56, 2).x
    x = x.repeat(1, 2) if act in GATED else x
    want = torch.cat([prefix.double(), activated(x.double(), act)], dim=1) @ down.double().t()
    assert relative_rms(act_down(x, act, None, down, prefix), want) < 1e-6
    scale = down[0].abs()
    torch.testing.assert_close(act_down(x, act, scale, down, prefix), act_down(x, act, None, down * scale, prefix))


@pytest.mark.parametrize("columns", [384, 1152])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("k", [16, 72, 1152, 2303, 2304, 3072, 4608, 12288, 15360, 20000])
def test_parts_cover_every_column_once(k: int, block: int, columns: int) -> None:
    split = pytest.importorskip("vdit_quant.kernels._triton.low_rank_down", reason="no Triton").split
    parts, chunk = split(k, block, columns)
    assert chunk % block == 0
    assert (parts - 1) * chunk < k <= parts * chunk
    assert parts <= max(1, min(8, k // columns))


def test_empty_batch(make_layer) -> None:
    x, down = torch.zeros(0, 16), torch.zeros(4, 16)
    assert norm_down(x, [], [], None, down, "rms", 1e-6).shape == act_down(x, "silu", None, down).shape == (0, 4)


def test_errors_name_the_op_what_was_expected_and_found() -> None:
    x, down = torch.zeros(3, 16), torch.zeros(4, 16)
    with pytest.raises(ValueError, match=r"norm_down: expected a float down \[R, 16\], found torch.float32 of shape"):
        norm_down(x, [], [], None, down[:, :8], "rms", 1e-6)
    with pytest.raises(ValueError, match=r"norm_down: expected kind to be one of layer, rms, found 'batch'"):
        norm_down(x, [], [], None, down, "batch", 1e-6)
    with pytest.raises(ValueError, match=r"act_down: expected pre_scale torch.float32 of shape \(16,\), found"):
        act_down(x, "none", x[0, :8], down)
    with pytest.raises(ValueError, match=r"act_down: expected act to be one of none, .*, found 'relu'"):
        act_down(x, "relu", None, down)
    with pytest.raises(ValueError, match=r"act_down: expected a float prefix of shape \(3, P\), found"):
        act_down(x[:, :8], "none", None, down, x[:2, 8:])
