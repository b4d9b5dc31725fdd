"""Side-by-side pictures: full precision, compressed, and where they differ."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

GAIN = 8  # the difference row is amplified this much
LABEL_WIDTH = 96
TILE = 128


def save_pairs(path: Path, baseline: Tensor, compressed: Tensor) -> None:
    """Three rows of tiles: baseline, compressed, |difference| x 8. Both float [n, C, H, W] (videos: first frame)."""
    want, got = displayable(baseline), displayable(compressed)
    rows = (
        ("full precision", want),
        ("compressed", got),
        (f"difference x{GAIN}", ((got - want).abs() * GAIN).clamp(0, 1)),
    )
    sheet = Image.new("RGB", (LABEL_WIDTH + TILE * len(want), TILE * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows):
        draw.text((6, y * TILE + TILE // 2 - 6), label, fill="black")
        for x, image in enumerate(images):
            sheet.paste(_tile(image), (LABEL_WIDTH + x * TILE, y * TILE))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def displayable(samples: Tensor) -> Tensor:
    """float [n, 3, H, W] in 0..1 from images, videos (first frame) or latents (first three channels, squashed; packed
    ones [n, tokens, channels] as they are, in grey)."""
    frames = {3: samples[:, None], 5: samples[:, 0]}.get(samples.dim(), samples)
    frames = frames[:, :3] if frames.shape[1] >= 3 else frames[:, :1].expand(-1, 3, -1, -1)
    in_range = bool(frames.min() >= 0) and bool(frames.max() <= 1)
    return frames.float() if in_range else torch.sigmoid(frames.float())


def _tile(image: Tensor) -> Image.Image:
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
