"""Compress a model that is not from diffusers, and load the artifact into a fresh instance of it.

python examples/own_module.py [FOLDER]          writes FOLDER/tiny-w4a8/
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import vdit_quant


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Tiny(nn.Module):
    """A ModuleList of like blocks is what the generic family looks for; layers outside it keep their precision."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model, x = Tiny().eval(), torch.randn(8, 32, 128)
    want = model(x)
    data = [x[i : i + 4] for i in (0, 4)]  # what the model is called with, for methods that learn from activations
    artifact = vdit_quant.compress(model, folder / "tiny-w4a8", data=data, bits="w4a8", overwrite=True)

    again = vdit_quant.load_into(Tiny(), artifact)
    print(again.blocks[0].fc1)
    print(f"relative error of the output: {float((again(x) - want).norm() / want.norm()):.4f}")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
