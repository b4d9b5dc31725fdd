"""Metrics on cases whose value is known."""

import math

import pytest
import torch

from vdit_quant.evaluate.metrics import mean_psnr, pooled_psnr, relative_error, ssim
from vdit_quant.evaluate.picture import displayable


def test_psnr_of_a_known_error() -> None:
    want = torch.rand(3, 3, 8, 8) * 0.5
    assert mean_psnr(want + 0.1, want) == pytest.approx(20, abs=1e-3)
    assert pooled_psnr(want + 0.1, want) == pytest.approx(20, abs=1e-3)
    assert mean_psnr((want + 0.1) * 255, want * 255, 255) == pytest.approx(20, abs=1e-3)


def test_equal_samples_count_a_hundred_decibels() -> None:
    want = torch.rand(2, 3, 8, 8)
    assert mean_psnr(want, want) == pooled_psnr(want, want) == pytest.approx(100)


def test_the_mean_is_over_samples_and_the_pooled_value_over_errors() -> None:
    want = torch.zeros(2, 1, 4, 4)
    got = want.clone()
    got[0] += 0.1
    got[1] += 0.001
    assert mean_psnr(got, want) == pytest.approx(40, abs=1e-3)
    assert pooled_psnr(got, want) == pytest.approx(10 * math.log10(2 / (0.01 + 1e-6)), abs=1e-3)


def test_relative_error_has_no_unit() -> None:
    want = torch.randn(4, 5)
    assert relative_error(want * 1.25, want) == pytest.approx(0.25)
    assert relative_error(want * 1250, want * 1000) == pytest.approx(0.25)


def test_ssim_is_one_for_equal_images_and_falls_with_noise() -> None:
    want = torch.rand(2, 3, 32, 32)
    values = [float(ssim((want + s * torch.randn_like(want)).clamp(0, 1), want).mean()) for s in (0, 0.05, 0.3)]
    assert values[0] == pytest.approx(1)
    assert values[0] > values[1] > values[2]
    video = want[:, None].expand(-1, 4, -1, -1, -1)
    assert ssim(video, video).tolist() == pytest.approx([1] * 2 * 4)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 8), (2, 16, 8, 8), (2, 5, 3, 8, 8)])
def test_everything_that_is_sampled_can_be_shown(shape: tuple[int, ...]) -> None:
    shown = displayable(torch.randn(shape))
    assert shown.shape == (2, 3, 8, 8)
    assert float(shown.min()) >= 0
    assert float(shown.max()) <= 1
