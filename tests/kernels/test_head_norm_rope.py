from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels.head_norm_rope import head_norm_rope

HEADS, HEAD = 3, 16
WIDTH = HEADS * HEAD


def stream(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The q/k/v part of a projection that also holds a feed-forward's."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 5 * WIDTH, generator=g).to(dtype)[..., : 3 * WIDTH]


def weights(size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (5, 6)]


def rope(tokens: int) -> list[Tensor]:
    angle = torch.rand(tokens, HEAD // 2, generator=torch.Generator().manual_seed(7)).repeat_interleave(2, 1) * 9
    return [angle.cos(), angle.sin()]


def diffusers_chain(qkv: Tensor, own: list[Tensor], tables: list[Tensor], across: bool) -> list[Tensor]:
    """q, k, v of one stream by torch's RMSNorm and diffusers' rotary embedding, at the precision of `qkv`."""
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is not installed")
    q, k, v = qkv.chunk(3, -1)
    normed = []
    for x, weight in zip((q, k), own, strict=True):
        x = x if across else x.unflatten(2, (HEADS, HEAD))
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6)
        normed.append(embeddings.apply_rotary_emb(x.view(*x.shape[:2], HEADS, HEAD), tables, sequence_dim=1))
    return [*normed, v.unflatten(2, (HEADS, HEAD))]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_chain_of_diffusers(dtype: torch.dtype, across: bool, relative_rms) -> None:
    qkv, own, tables = stream(7, 0, dtype), weights(WIDTH if across else HEAD, dtype), rope(7)
    got = head_norm_rope(qkv, own, None, [], tables, HEADS, 1e-6)
    want = diffusers_chain(qkv.double(), [w.double() for w in own], [t.double() for t in tables], across)
    chain = diffusers_chain(qkv, own, tables, across)
    for part, exact, usual in zip(got, want, chain, strict=True):
        assert part.dtype == dtype
        # float32: 2**-22, a few roundings.
        assert relative_rms(part, exact) <= max(relative_rms(usual, exact), 2.4e-7)


@pytest.mark.parametrize("across", [False, True])
def test_with_biases_the_norm_is_a_layer_norm(across: bool) -> None:
    size = WIDTH if across else HEAD
    qkv, affine = stream(7, 0) + 3, weights(size) + [w.flip(0) for w in weights(size)]
    got = head_norm_rope(qkv, affine, None, [], [], HEADS, 1e-6)
    for part, x, weight, bias in zip(got, qkv.chunk(3, -1), affine[:2], affine[2:], strict=False):
        x = x if across else x.unflatten(2, (HEADS, HEAD))
        want = torch.nn.functional.layer_norm(x, (size,), weight, bias, 1e-6).view(part.shape)
        torch.testing.assert_close(part, want, atol=1e-5, rtol=1e-5)


def test_rounds_once(relative_rms) -> None:
    qkv, own, tables = stream(7, 0, torch.bfloat16), weights(HEAD, torch.bfloat16), rope(7)
    got = head_norm_rope(qkv, own, None, [], tables, HEADS, 1e-6)
    assert torch.equal(got, head_norm_rope(qkv.float(), own, None, [], tables, HEADS, 1e-6).bfloat16())


def test_two_streams_follow_one_another_each_with_its_own_norm() -> None:
    first, second, tables = stream(3, 0), stream(4, 1), rope(7)
    own, other = weights(HEAD), [w.flip(0) for w in weights(HEAD)]
    joint = head_norm_rope(first, own, second, other, tables, HEADS, 1e-6)
    assert joint.shape == (3, 2, 7, HEADS, HEAD)
    assert joint.is_contiguous()
    alone = [
        head_norm_rope(first, own, None, [], [t[:3] for t in tables], HEADS, 1e-6),
        head_norm_rope(second, other, None, [], [t[3:] for t in tables], HEADS, 1e-6),
    ]
    assert torch.equal(joint, torch.cat(alone, 2))


def test_without_norm_and_rope_the_projection_is_only_rearranged() -> None:
    qkv = stream(5, 0, torch.bfloat16)
    want = qkv.unflatten(2, (3, HEADS, HEAD)).permute(2, 0, 1, 3, 4)
    assert torch.equal(head_norm_rope(qkv, [], None, [], [], HEADS, 1e-6), want)


def test_rotation_keeps_the_length_of_every_pair() -> None:
    qkv = stream(6, 0)
    plain, turned = (head_norm_rope(qkv, [], None, [], tables, HEADS, 1e-6) for tables in ([], rope(6)))
    pairs = (x[:2].unflatten(-1, (-1, 2)).square().sum(-1) for x in (plain, turned))
    torch.testing.assert_close(*pairs)
    assert torch.equal(plain[2], turned[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 5, 40)}, "qkv float32, bfloat16 or float16"),
        ({"qkv": torch.zeros(5, 3 * WIDTH)}, "qkv float32, bfloat16 or float16"),
        ({"heads": 0}, "heads > 0"),
        ({"weights": weights(HEAD)[:1]}, "no norm weights of qkv, or those of q and k, and .*, found 1"),
        ({"weights": weights(HEAD + 1)}, r"norm weights of qkv \[16\] \(per head\) or \[48\]"),
        ({"weights": [weights(HEAD)[0], weights(WIDTH)[0]]}, "norm weights of qkv"),
        ({"other": torch.zeros(1, 5, 3 * WIDTH)}, r"other torch.float32 \[2, T, 144\]"),
        ({"rope": rope(5)}, r"rope torch.float32 of shape \(7, 16\)"),
        ({"rope": rope(7)[:1]}, "no rope, or its cosines and sines"),
        ({"rope": [t.half() for t in rope(7)]}, "rope torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"qkv": stream(3, 0), "weights": weights(HEAD), "other": stream(4, 1)}
    given |= {"other_weights": weights(HEAD), "rope": rope(7), "heads": HEADS, "eps": 1e-6}
    assert head_norm_rope(**given).shape == (3, 2, 7, HEADS, HEAD)
    with pytest.raises(ValueError, match=f"head_norm_rope: expected {message}"):
        head_norm_rope(**{**given, **change})
