"""A comparison as tables: one row a seed, and the error along the sampling run."""

from __future__ import annotations

import math

from ..evaluate.compare import Comparison
from .console import bold, console, human_bytes, print_table, table


def print_comparison(result: Comparison) -> None:
    w = result.workload
    guidance = "the pipeline's default" if w["guidance_scale"] is None else w["guidance_scale"]
    console.print(
        bold(result.artifact),
        f" against {result.baseline}: {w['samples']} samples a seed, {w['steps']} steps, "
        f"{result.sampler}, guidance {guidance}, {result.dtype} on {result.device}",
        sep="",
    )
    rows = table("seed", "PSNR dB", "SSIM", "relative error", right=("PSNR dB", "SSIM", "relative error"))
    for s in result.seeds:
        rows.add_row(str(s.seed), f"{s.psnr:.2f}", _ssim(s.ssim), f"{s.latent_error:.4f}")
    spread = f" +- {result.psnr_spread:.2f}" if len(result.seeds) > 1 else ""
    rows.add_row("mean", f"{result.psnr:.2f}{spread}", _ssim(result.ssim), "")
    print_table(rows)
    errors = [sum(step) / len(result.seeds) for step in zip(*(s.step_error for s in result.seeds), strict=True)]
    if errors:
        shown = sorted({round(i * (len(errors) - 1) / 7) for i in range(8)})
        console.print("latent error by step: " + "  ".join(f"{i + 1}: {errors[i]:.4f}" for i in shown))
    ratio = result.bytes_artifact / result.bytes_baseline
    console.print(
        f"denoiser {human_bytes(result.bytes_baseline)} -> {human_bytes(result.bytes_artifact)} ({ratio:.2f}x); "
        f"sampling took {result.seconds_baseline:.1f} s and {result.seconds_artifact:.1f} s "
        "(not a benchmark: cold, one run)"
    )


def _ssim(value: float) -> str:
    """Latents have none."""
    return "-" if math.isnan(value) else f"{value:.4f}"
