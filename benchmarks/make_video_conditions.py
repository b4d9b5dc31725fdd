"""The conditions file of a moving-digits video model: every digit in every direction.

    python benchmarks/make_video_conditions.py TOKENS.safetensors conditions.safetensors

TOKENS holds `tokens` [16, width]: rows 0-9 the digits, 10-13 the directions (right, left, down, up), 14 nothing, 15 the
end. Condition 4 * digit + direction of the output is `tokens[[digit, 10 + direction, 15]]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DIGITS, DIRECTIONS, NOTHING, END = 10, 4, 14, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--latents-shape", type=int, nargs="+", default=[1, 8, 32, 32], help="default: 1 8 32 32")
    options = parser.parse_args()
    tokens = load_file(options.tokens)["tokens"].float()
    rows = [[digit, DIGITS + direction, END] for digit in range(DIGITS) for direction in range(DIRECTIONS)]
    tensors = {
        "encoder_hidden_states": tokens[torch.tensor(rows)],
        "uncond.encoder_hidden_states": tokens[torch.tensor([[NOTHING] * 3])],
        "latents_shape": torch.tensor(options.latents_shape),
    }
    save_file(tensors, options.output)
    print(f"wrote {options.output}: {', '.join(f'{name} {list(t.shape)}' for name, t in tensors.items())}")


if __name__ == "__main__":
    main()
