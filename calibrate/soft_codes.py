"""A linear layer whose codes are being chosen: every run of weights is a mixture of a few codebook entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.hadamard import matrix_on
from ..quantize.format import Tensors
from ..quantize.rotate import rotate_rows
from ..quantize.spec import HadamardSpec, LayerSpec
from ..quantize.vector import VectorFormat, nearest_few

OWN_LOGIT = 2.0  # what a run's present code starts with; the other candidates start at 0
FIXED_LOGIT = 40.0  # a softmax of it is one-hot in float32


class SoftCodes(nn.Module):
    """`W = s[n] sum_j softmax(z)_j C[A_j]` (VQ4DiT, Deng et al. 2024, arXiv 2408.17131, section 3.2), trained by
    gradients in z, the codebook C, the row scales s and the bias. The layer's rotation, low-rank branch and input scale
    are around it and stay as they are.

    tensors  what the layer is stored as now; the run's present code is always a candidate
    weight   float32 [N, K], the layer before compression: candidates are the entries nearest to it
    """

    def __init__(self, tensors: Tensors, spec: LayerSpec, weight: Tensor, bias: Tensor | None, candidates: int) -> None:
        super().__init__()
        fmt = spec.weight.resolve()
        assert isinstance(fmt, VectorFormat)
        self.fmt, self.spec, self.tensors = fmt, spec, tensors
        self.shape = weight.shape
        self.signs = tensors.get("hadamard_signs")
        self.factors = tuple(tensors[name].float() for name in ("proj_up", "proj_down")) if spec.rank else None
        self.input_scale = tensors["pre_quant_scale"] if spec.pre_scale else None
        unit = tensors["weight_codebook"][0].float().square().mean().sqrt()
        unit = torch.where(unit > 0, unit, 1.0)  # a layer of zeros has a codebook of zeros
        self.scale = tensors["weight_scale"] * unit
        self.book = nn.Parameter(tensors["weight_codebook"][0].float() / unit)
        self.gain = nn.Parameter(torch.ones_like(self.scale))
        self.bias = None if bias is None else nn.Parameter(bias.float().clone())
        own = fmt.codes(tensors, weight.shape[1]).flatten()
        self.choices = self._candidates(own, weight, min(candidates, fmt.entries))
        self.logits = nn.Parameter(torch.zeros(self.choices.shape, device=weight.device))
        self.logits.data[:, 0] = OWN_LOGIT
        self.hard = False  # True: every run is its largest candidate alone
        self.fixed = torch.zeros(len(own), dtype=torch.bool, device=weight.device)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.dense().to(input.dtype), bias)

    def dense(self) -> Tensor:
        """float32 [N, K]: the weight as it is now, in the input's own channels."""
        if self.hard:
            runs = self.book.index_select(0, self.codes())
        else:
            entries = self.book.index_select(0, self.choices.flatten()).view(*self.choices.shape, -1)
            runs = (self.logits.softmax(1)[..., None] * entries).sum(1)
        weight = runs.view(self.shape) * (self.scale * self.gain)[:, None]
        if self.spec.hadamard is not None:
            weight = self._unrotate(weight, self.spec.hadamard)
        if self.factors is not None:
            weight = weight + self.factors[0] @ self.factors[1]
        return weight if self.input_scale is None else weight * self.input_scale

    def ratio_loss(self) -> Tensor:
        """How far the mixtures still are from one candidate each: n mean r (1 - r) over runs that are not fixed."""
        if self.hard:
            return self.logits.new_zeros(())
        # masked, not picked: how many runs are free is known on the GPU alone
        share, free = self.logits.softmax(1), ~self.fixed
        return ((share * (1 - share)).sum(1) * free).sum() / free.sum().clamp_min(1)

    @torch.no_grad()
    def harden(self, share: float) -> None:
        """Fixes every run of which one candidate has at least this share. 0: all of them."""
        if self.hard:
            return
        largest, place = self.logits.softmax(1).max(1)
        self.fixed |= largest >= share
        own = torch.arange(self.logits.shape[1], device=place.device) == place[:, None]
        self.logits.copy_(torch.where(self.fixed[:, None], own * FIXED_LOGIT, self.logits))
        self.hard = share == 0

    def snapshot(self) -> list[Tensor]:
        """Copies of everything that is trained, for `restore`."""
        return [p.detach().clone() for p in self.parameters()]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Back to what `snapshot` saw, every run as its largest candidate."""
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)
        self.hard = True

    def codes(self) -> Tensor:
        """int64 [N K / d]: the candidate with the largest share of every run."""
        return self.choices.gather(1, self.logits.argmax(1, keepdim=True))[:, 0]

    @torch.no_grad()
    def store(self) -> Tensors:
        """The layer's stored tensors, every run as its largest candidate."""
        stored = self.fmt.store(self.codes().view(self.shape[0], -1), self.book, self.scale * self.gain)
        return {**self.tensors, **stored}

    def _candidates(self, own: Tensor, weight: Tensor, count: int) -> Tensor:
        """int64 [L, count]: the present code, then the entries nearest to what the codes stand for of the weight."""
        if self.input_scale is not None:
            weight = weight / self.input_scale
        if self.factors is not None:
            weight = weight - self.factors[0] @ self.factors[1]
        if self.spec.hadamard is not None:
            assert self.signs is not None
            weight = rotate_rows(weight, self.signs, self.spec.hadamard)
        runs = self.fmt.split(weight / self.scale.clamp_min(1e-30)[:, None])
        near = nearest_few(runs, self.book.detach(), count)
        rest = torch.where(near == own[:, None], near[:, -1:], near)  # the own code's place goes to the last candidate
        return torch.cat((own[:, None], rest[:, : count - 1]), 1)

    def _unrotate(self, weight: Tensor, spec: HadamardSpec) -> Tensor:
        """The rotation undone, by operations that gradients pass through."""
        assert self.signs is not None
        h = matrix_on(spec.block_size, spec.kind, weight) * spec.block_size**-0.5
        return (weight.view(-1, spec.block_size) @ h).view(self.shape) * self.signs
