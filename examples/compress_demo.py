"""Compress the bundled demo checkpoint, load the artifact and draw a row of digits.

python examples/compress_demo.py [FOLDER]       writes FOLDER/demo-w4a8/ and FOLDER/digits.png
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import vdit_quant


def main(folder: Path) -> None:
    artifact = vdit_quant.compress(output=folder / "demo-w4a8", bits="w4a8", overwrite=True)
    pipe = vdit_quant.load(artifact)
    digits = [3, 1, 4, 1, 5, 9]
    noise = [torch.Generator().manual_seed(i) for i in range(len(digits))]  # one generator an image
    images = pipe(digits, guidance_scale=1.5, num_inference_steps=10, generator=noise).images

    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        row.paste(image, (i * width, 0))
    row.resize((row.width * 4, row.height * 4)).save(folder / "digits.png")
    print(f"wrote {folder / 'digits.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
