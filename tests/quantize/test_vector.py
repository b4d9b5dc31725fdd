"""Weights as codes of a codebook: rounding that knows the inputs, and layers that are joined."""

import pytest
import torch
from torch import Tensor

from vdit_quant.quantize.layer import dense_weight
from vdit_quant.quantize.method import FloatLayer, resolve_method
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.quantize.stats import LayerStats
from vdit_quant.quantize.vector import (
    VectorFormat,
    VectorRounding,
    fit_codebook,
    nearest,
    round_to_vectors,
    round_vectors,
)

N, K = 48, 64


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gram() -> Tensor:
    """Of inputs that go together: each channel is mostly a few common ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 8, generator=generator) @ torch.randn(8, K, generator=generator)
    x = x + 0.3 * torch.randn(512, K, generator=generator)
    return x.T @ x / len(x)


def format_of(name: str) -> VectorFormat:
    fmt = LayerSpec.parse(name).weight.resolve()
    assert isinstance(fmt, VectorFormat)
    return fmt


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    error = weight - rounded
    return float(((error @ gram) * error).sum() / ((weight @ gram) * weight).sum())


def test_several_threads_find_one_codebook() -> None:
    vectors = torch.randn(60_000, 4, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        books = [fit_codebook(vectors, torch.ones_like(vectors), 16, iterations=3) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(book, books[0]) for book in books)


@pytest.mark.parametrize("name", ["wvq2", "wvq3"])
def test_uncorrelated_inputs_get_the_nearest_entries(weight: Tensor, name: str) -> None:
    vectors = format_of(name).split(weight)
    book = fit_codebook(vectors, torch.ones_like(vectors), 16)
    codes, rounded = round_vectors(weight, torch.eye(K), book)
    want = nearest(vectors, torch.ones_like(vectors), book).view(N, -1)
    assert torch.equal(codes, want)
    assert torch.equal(rounded, book[want].flatten(1))


@pytest.mark.parametrize("name", ["wvq2", "wvq3"])
def test_errors_fed_back_cost_the_output_less(weight: Tensor, gram: Tensor, name: str) -> None:
    fmt, spec = format_of(name), LayerSpec.parse(name).weight
    errors = [
        output_error(weight, fmt.decode(round_to_vectors(weight, gram, fmt, how), K, spec), gram)
        for how in (VectorRounding(), VectorRounding(feedback=False))
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", ["wvq2", "wvq3", "wvq2-h64"])
def test_gptq_rounds_to_a_codebook_too(weight: Tensor, gram: Tensor, name: str) -> None:
    """Not only the method that the format is named after: in a mixed plan one method rounds every candidate."""
    spec = LayerSpec.parse(name)
    stats = LayerStats(torch.ones(1, 2, K), gram.diagonal(), gram, count=1)
    method, params = resolve_method("gptq", {})
    tensors = method.compress(FloatLayer("layer", weight), stats, spec, **params)
    nearest_of_all = format_of(name).round(weight, spec.weight)
    assert output_error(weight, dense_weight(tensors, K, spec), gram) < 0.5 * output_error(weight, nearest_of_all, gram)


@pytest.mark.parametrize("name", ["wvq2", "wvq3"])
def test_joined_layers_keep_their_codebooks(weight: Tensor, name: str) -> None:
    fmt, spec = format_of(name), LayerSpec.parse(name).weight
    each = [fmt.encode(part, spec) for part in (weight, 3 * weight[:17].roll(1, 1))]
    both = {key: torch.cat([tensors[key] for tensors in each]) for key in each[0]}
    both["weight_owner"] = torch.tensor([0] * N + [1] * 17, dtype=torch.uint8)
    want = [fmt.to_int8(tensors, K, spec) for tensors in each]
    for got, *parts in zip(fmt.to_int8(both, K, spec), *want, strict=True):
        assert torch.equal(got, torch.cat(parts))
