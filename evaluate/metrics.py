"""Paired metrics between full-precision and compressed samples of the same seeds."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def sample_psnr(got: Tensor, want: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of every sample in dB, float64 [n], from [n, ...] each. Equal samples count 100."""
    error = (got.double() - want.double()).flatten(1).square().mean(1)
    return 10 * torch.log10(data_range**2 / error.clamp_min(data_range**2 * 1e-10))


def mean_psnr(got: Tensor, want: Tensor, data_range: float = 1.0) -> float:
    """`sample_psnr` averaged over samples."""
    return float(sample_psnr(got, want, data_range).mean())


def pooled_psnr(got: Tensor, want: Tensor, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of the mean squared error over all samples."""
    error = (got.double() - want.double()).square().mean()
    return float(10 * torch.log10(data_range**2 / error.clamp_min(data_range**2 * 1e-10)))


def ssim(got: Tensor, want: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images [n, C, H, W] or videos [n, frames, C, H, W] in 0..1: float32
    [n * frames], one of each frame."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    pairs = zip(*(t.reshape(-1, 1, *t.shape[-3:]) for t in (got, want)), strict=True)
    # one at a time: it takes some sixty times the memory of what it compares
    values = [structural_similarity_index_measure(a.float(), b.float(), data_range=1.0) for a, b in pairs]
    return torch.stack(cast(list[Tensor], values))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over root mean square of `want`."""
    return error_of(square_sums(got, want))


def square_sums(got: Tensor, want: Tensor) -> Tensor:
    """What `error_of` needs of samples, and what adds up over parts of them: float64 [3], the sums of the squares of
    the difference and of `want`, and the number of values."""
    error, power = (got.double() - want.double()).square().sum(), want.double().square().sum()
    return torch.stack([error, power, torch.full_like(power, want.numel())])


def error_of(sums: Tensor) -> float:
    """The relative error of all samples that `square_sums` were added up over."""
    error, power, count = sums
    return float((error / count).sqrt() / (power / count).sqrt())
