"""Vector quantisation: runs of a row's weights replaced by the nearest entry of one codebook a layer.

    w[n, j d : (j + 1) d] = C[code[n, j]] * weight_scale[n],   C int8 [E, d]

The codebook is int8, so that a layer decodes *exactly* to int8 with one fp32 scale per row and runs the 8-bit products.
Rounding the codebook costs about 40 dB below the weight, 30 dB below what the codes lose. The row's scale makes rows
alike before they share a codebook.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.codebook_decode import BITS, codebook_to_int8
from ..kernels.pack import code_bytes, pack_codes, unpack_codes
from .errors import InputError
from .format import Format, TensorLayout, Tensors, activation_ops
from .gptq import DAMP, inverse_factor, output_gain
from .integer import TINY, int8_form_linear
from .spec import FormatSpec, LayerSpec

CHUNKS = {"cpu": 1 << 16, "cuda": 1 << 19}
"""Vectors whose distances to every entry are held at a time: half a GB for 256 entries on a GPU, where starting the
kernels of smaller pieces takes longer than running them."""
ITERATIONS = 25
SAMPLE = 1 << 14  # vectors that the first codebook is drawn from


class VectorFormat(Format):
    """weight uint8 [N, ceil(b K / 8 d)], the codes without gaps; weight_codebook int8 [1, E, d]; weight_scale
    float32 [N].

    entries  E, the size of a codebook: 16, 64 or 256, of b = 4, 6 or 8 bits
    length   d, the weights an entry stands for: 1, 2 or 4
    """

    stacked = ("weight_codebook",)

    def __init__(self, entries: int, length: int) -> None:
        self.entries, self.length, self.bits = entries, length, BITS[entries]

    def check(self, k: int, spec: FormatSpec) -> None:
        super().check(k, spec)
        if k % self.length:
            raise InputError(f"format {spec.format}: K = {k} is not a multiple of an entry's {self.length} weights")

    def layout(self, n: int, k: int, spec: FormatSpec) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout((n, code_bytes(k // self.length, self.bits)), torch.uint8),
            "weight_codebook": TensorLayout((1, self.entries, self.length), torch.int8),
            "weight_scale": TensorLayout((n,), torch.float32),
        }

    def encode(self, weight: Tensor, spec: FormatSpec) -> Tensors:
        """Nearest entries of the codebook that k-means finds."""
        scale = row_scale(weight)
        vectors = self.split(weight / scale[:, None])
        book = fit_codebook(vectors, torch.ones_like(vectors), self.entries)
        codes = nearest(vectors, torch.ones_like(vectors), book)
        return self.store(codes.view(len(weight), -1), book, scale * (weight != 0).any(1))

    def split(self, weight: Tensor) -> Tensor:
        """float [N, K] -> [N K / d, d]."""
        return weight.float().reshape(-1, self.length)

    def store(self, codes: Tensor, book: Tensor, scale: Tensor) -> Tensors:
        """codes int64 [N, K / d], book float32 [E, d], scale float32 [N] -> the stored tensors."""
        step = (book.abs().amax() / 127).clamp_min(TINY)
        return {
            "weight": pack_codes(codes, self.bits),
            "weight_codebook": (book / step).round().clamp(-127, 127).to(torch.int8)[None],
            "weight_scale": (scale * step).float(),
        }

    def codes(self, tensors: Tensors, k: int) -> Tensor:
        """int64 [N, K / d]."""
        return unpack_codes(tensors["weight"], k // self.length, self.bits).long()

    def decode(self, tensors: Tensors, k: int, spec: FormatSpec) -> Tensor:
        table = tensors["weight_codebook"][0].float()
        return table[self.codes(tensors, k)].flatten(1) * tensors["weight_scale"][:, None]

    def to_int8(self, tensors: Tensors, k: int, spec: FormatSpec) -> tuple[Tensor, Tensor]:
        owner = tensors.get("weight_owner")
        return codebook_to_int8(tensors["weight"], tensors["weight_codebook"], owner, None, k), tensors["weight_scale"]

    def ops(self, spec: LayerSpec) -> tuple[str, ...]:
        rows = activation_ops(spec.activation)
        product = ("int8_weight_linear",) if rows is None else ("int8_linear",)
        return (*(rows or ()), "codebook_to_int8", *product)

    def linear(self, x: Tensor, tensors: Tensors, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        """x: float [M, K] -> [M, N] in x's dtype."""
        return int8_form_linear(x, *self.to_int8(tensors, x.shape[-1], spec.weight), spec, bias)


@dataclass(frozen=True)
class VectorRounding:
    """How `round_to_vectors` goes about it.

    feedback         feed each run's error into the columns that follow (`round_vectors`); else the nearest entries
    damp, act_order  as in GPTQ
    scales           a scale for each row before the codebook; else one for all
    importance       errors count as much as their inputs in k-means and among the nearest entries
    unbiased         scale every rounded row so that its output, projected on the exact output, is the exact output
    """

    feedback: bool = True
    damp: float = DAMP
    act_order: bool = True
    scales: bool = True
    importance: bool = True
    unbiased: bool = True


def round_to_vectors(
    weight: Tensor, gram: Tensor, fmt: VectorFormat, how: VectorRounding = VectorRounding()
) -> Tensors:
    """The stored tensors of a weight float32 [N, K]; gram: float32 [K, K], the mean of x x^T over its inputs."""
    scale = row_scale(weight) if how.scales else row_scale(weight.reshape(1, -1)).expand(len(weight))
    plain = weight / scale[:, None]
    mass = scale.square()[:, None] / scale.square().mean()
    if how.importance:
        mass = mass * (gram.diagonal() / gram.diagonal().mean().clamp_min(TINY)).clamp_min(1e-6)
    vectors, masses = fmt.split(plain), fmt.split(mass.expand_as(plain))
    book = fit_codebook(vectors, masses, fmt.entries)
    if how.feedback:
        codes, rounded = round_vectors(plain, gram, book, how.damp, how.act_order)
    else:
        codes = nearest(vectors, masses, book).view(len(weight), -1)
        rounded = book[codes].flatten(1)
    if how.unbiased:
        scale = scale * output_gain(plain, rounded, gram)
    return fmt.store(codes, book, scale * (weight != 0).any(1))


def row_scale(weight: Tensor) -> Tensor:
    """float32 [N]: the root mean square of every row, 1 for a row of zeros."""
    wide = weight.float()
    largest = wide.abs().amax(1).clamp_min(TINY)  # taken out first: squares of large numbers overflow
    scale = largest * (wide / largest[:, None]).square().mean(1).sqrt()
    return torch.where(scale > TINY, scale, 1.0)


def nearest(vectors: Tensor, importance: Tensor, book: Tensor) -> Tensor:
    """int64 [L]: for vectors float32 [L, d] the entry of `book` [E, d] with the least `sum_i importance (v - c)^2`."""
    return torch.cat([_distance(v, m, book).argmin(1) for v, m in _chunks(vectors, importance)])


def nearest_few(vectors: Tensor, book: Tensor, count: int) -> Tensor:
    """int64 [L, count]: the nearest entries, nearest first."""
    ones = torch.ones_like(vectors)
    return torch.cat([_distance(v, m, book).topk(count, 1, False)[1] for v, m in _chunks(vectors, ones)])


def fit_codebook(vectors: Tensor, importance: Tensor, entries: int, iterations: int = ITERATIONS) -> Tensor:
    """float32 [E, d]: weighted k-means (Lloyd 1982) from a k-means++ start (Arthur & Vassilvitskii 2007), with a fixed
    seed. An entry that no vector chooses becomes one of the vectors that are worst off.

    vectors     float32 [L, d]
    importance  float32 [L, d], what an element's squared error counts
    """
    book = _start(vectors, importance, entries)
    for _ in range(iterations):
        total, mass = torch.zeros_like(book), torch.zeros_like(book)
        distances: list[Tensor] = []
        for v, m in _chunks(vectors, importance):
            distance, index = _distance(v, m, book).min(1)
            distances.append(distance + (m * v * v).sum(1))
            _add_rows(total, index, m * v)
            _add_rows(mass, index, m)
        empty = mass.sum(1) <= 0
        moved = torch.where(mass > 0, total / mass.clamp_min(TINY), book)
        if empty.any():
            count = min(int(empty.sum()), len(vectors))
            moved[empty.nonzero()[:count, 0]] = vectors[torch.cat(distances).topk(count)[1]]
        book = moved
    return book


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """`total[index] += rows` in the same order every time: index_add_ has that on a CPU alone, index_put_ on a GPU."""
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)


def round_vectors(
    weight: Tensor, gram: Tensor, book: Tensor, damp: float = DAMP, act_order: bool = True
) -> tuple[Tensor, Tensor]:
    """GPTQ with entries of a codebook in the place of levels (after GPTVQ, van Baalen et al. 2024, arXiv 2402.15319).

    weight   float32 [N, K], rows already divided by their scales
    gram     float32 [K, K], sum or mean over rows of x x^T
    book     float32 [E, d]
    returns  codes int64 [N, K / d], and the rounded weight float32 [N, K]

    One step rounds d columns together: the entry is the one whose error, all later columns compensating for it, costs
    least, `|e U^-1|` with U the d columns' block of the upper Cholesky factor of the inverse of `gram`.
    """
    n, k = weight.shape
    d = book.shape[1]
    energy = gram.diagonal().view(-1, d).sum(1)
    blocks = energy.argsort(descending=True) if act_order else torch.arange(k // d, device=weight.device)
    order = (blocks[:, None] * d + torch.arange(d, device=weight.device)).flatten()
    factor = inverse_factor(gram[order][:, order], damp)
    work = weight[:, order].clone()
    codes = torch.empty(n, k // d, dtype=torch.int64, device=weight.device)
    rounded = torch.empty_like(work)
    for j in range(k // d):
        own = slice(j * d, (j + 1) * d)
        inverse = torch.linalg.inv(factor[own, own])
        seen, entries = work[:, own] @ inverse, book @ inverse
        codes[:, j] = nearest(seen, torch.ones_like(seen), entries)
        rounded[:, own] = book[codes[:, j]]
        error = (work[:, own] - rounded[:, own]) @ inverse
        work[:, own.stop :].addmm_(error, factor[own, own.stop :], alpha=-1)
    back = torch.empty_like(rounded)
    back[:, order] = rounded
    placed = torch.empty_like(codes)
    placed[:, blocks] = codes
    return placed, back


def _start(vectors: Tensor, importance: Tensor, entries: int) -> Tensor:
    """Entries drawn one by one, each with the probability of its distance to those drawn before."""
    generator = torch.Generator().manual_seed(0)
    stride = max(1, len(vectors) // SAMPLE)
    largest = (importance * vectors.square()).sum(1).argmax()  # one that no sample may leave out
    sample = torch.cat((vectors[largest][None], vectors[::stride]))
    weight = torch.cat((importance[largest][None], importance[::stride]))
    draws = torch.rand(entries, generator=generator).to(vectors.device)
    book = sample[:1].clone()
    distance = (weight * (sample - book).square()).sum(1)
    for draw in draws[1:]:
        total = distance.double().cumsum(0)
        place = torch.searchsorted(total, (draw * total[-1])[None]).clamp(max=len(sample) - 1)
        book = torch.cat((book, sample[place]))
        distance = torch.minimum(distance, (weight * (sample - book[-1]).square()).sum(1))
    return book


def _distance(vectors: Tensor, importance: Tensor, book: Tensor) -> Tensor:
    """[L, E]: sum_i importance (v - c)^2, less what does not depend on c."""
    # one product: passes over [L, E] are what k-means costs
    return torch.cat((importance, importance * vectors), 1) @ torch.cat((book.square(), -2 * book), 1).T


def _chunks(vectors: Tensor, importance: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = CHUNKS.get(vectors.device.type, CHUNKS["cpu"])
    return list(zip(vectors.split(size), importance.split(size), strict=True))
