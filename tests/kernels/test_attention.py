import pytest
import torch

from vdit_quant.kernels.attention import attention


def inputs(tokens: int, keys: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as slices of merged projections."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, tokens, 3, 4, 24, generator=g).to(dtype)[:, :, 0]
    k, v = torch.randn(2, keys, 2, 4, 24, generator=g).to(dtype).unbind(2)
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "keys"), [(7, 7), (1, 9), (9, 1)])
def test_equals_the_definition(tokens: int, keys: int, dtype: torch.dtype, relative_rms) -> None:
    q, k, v = inputs(tokens, keys, dtype)
    weights = torch.einsum("bthd,bshd->bhts", q.double(), k.double()).mul(0.3).softmax(-1)
    want = torch.einsum("bhts,bshd->bthd", weights, v.double()).flatten(2)
    y = attention(q, k, v, 0.3)
    assert y.is_contiguous()
    assert y.dtype == dtype
    # One rounding: no worse than the exact result in this dtype.
    assert relative_rms(y, want) <= 1.05 * relative_rms(want.to(dtype), want) + 5e-7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v, 1.0), "q float32"),
        (lambda q, k, v: (q.int(), k, v, 1.0), "q float32"),
        (lambda q, k, v: (q, k[..., :8], v, 1.0), r"k torch.float32 \[2, S, 4, 24\]"),
        (lambda q, k, v: (q, k, v.half(), 1.0), "v torch.float32"),
        (lambda q, k, v: (q, k, v[:, :1], 1.0), "as many values as keys"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0], 1.0), "at least one"),
        (lambda q, k, v: (q, k, v, 0.0), "a positive scale"),
    ],
)
def test_refuses_what_does_not_fit(change, message: str) -> None:
    for device in ("cpu", "meta"):
        args = change(*(x.to(device) for x in inputs(5, 5, torch.float32)))
        with pytest.raises(ValueError, match=f"attention: expected {message}|attention: expected .*{message}"):
            attention(*args)


def test_no_queries() -> None:
    q, k, v = inputs(3, 5, torch.float32)
    assert attention(q[:, :0], k, v, 1.0).shape == (2, 0, 96)
