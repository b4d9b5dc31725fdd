"""Load an artifact with plain diffusers: `import vdit_quant` is all that diffusers needs to read one.

python examples/plain_diffusers.py [FOLDER]     uses FOLDER/demo-w4a8/, or makes it; writes FOLDER/seven.png
"""

import sys
from pathlib import Path

import torch
from diffusers import DiTPipeline

import vdit_quant


def main(folder: Path) -> None:
    artifact = folder / "demo-w4a8"
    if not artifact.exists():
        vdit_quant.compress(output=artifact, bits="w4a8")

    pipe = DiTPipeline.from_pretrained(artifact, dtype=torch.float32)
    print(type(pipe.transformer.transformer_blocks[0].attn1.to_q).__name__)
    noise = torch.Generator().manual_seed(0)
    image = pipe([7], guidance_scale=1.5, num_inference_steps=10, generator=noise).images[0]
    image.resize((128, 128)).save(folder / "seven.png")
    print(f"wrote {folder / 'seven.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
