"""TerDiT's published checkpoints (Lu et al. 2024, arXiv 2405.14854) as artifacts.

    weight  uint8 [N/4, K]   the byte at (r, k) holds the rows r, r + N/4, r + 2N/4, r + 3N/4 of column k, from the
                             highest two bits to the lowest; 0, 1, 2 stand for -1, 0, 1, and 3 for nothing
    alphas  float [1]        a of w = a q, of any sign; [N] is read as one a row
    bias    float [N]        optional

The published models are Large-DiTs with an RMSNorm behind every modulation layer (`models.large_dit`), so `load` makes
them. A model of another architecture is loaded with `load_into` by a class of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..kernels.pack import code_bytes, pack_codes
from ..quantize.errors import InputError
from ..quantize.spec import FormatSpec, LayerSpec
from .artifact import DTYPES, make_config
from .checkpoint import read_header, refuse_pickle
from .writer import Entry, staged, write_json, write_tensors

SHIFTS = (6, 4, 2, 0)  # of the four rows in a byte
Headers = dict[str, tuple[tuple[int, ...], torch.dtype]]


def import_terdit(
    checkpoint: str | Path,
    output: str | Path,
    activation: FormatSpec | None = None,
    overwrite: bool = False,
    heads: int = 32,
    sample_size: int = 32,
) -> dict[str, tuple[int, int]]:
    """Writes the artifact of a TerDiT checkpoint and returns the (N, K) of its ternary layers by name.

    checkpoint   a safetensors file of one partition, in the layout above
    activation   what activations are quantised to; None: they stay in the compute dtype
    heads        attention heads of a Large-DiT, which the file does not tell; every published one has 32
    sample_size  latent pixels a side of a Large-DiT: 32 for images of 256 pixels
    Raises InputError, with nothing left half written, for a file that is none, or holds a layer in another layout.
    """
    from .models import large_dit  # needs diffusers, which importing this module must not

    path, spec = Path(checkpoint), LayerSpec(FormatSpec("ternary"), activation)
    headers, read = _open(path)
    shapes = ternary_layers(headers, path)
    entries: dict[str, Entry] = {}
    for name, found in headers.items():
        layer, _, key = name.rpartition(".")
        if layer not in shapes or key not in ("weight", "alphas"):
            entries[name] = found
        elif key == "weight":
            n, k = shapes[layer]
            entries[f"{layer}.weight"] = ((n, code_bytes(k, 2)), torch.uint8)
            entries[f"{layer}.weight_scale"] = ((n,), torch.float32)

    def get(name: str) -> Tensor:
        layer, _, key = name.rpartition(".")
        if layer in shapes and key == "weight":
            return pack_codes(unpack_rows(read(name), f"{path}, {layer}"), 2)
        if layer in shapes and key == "weight_scale":
            return _scale(read(f"{layer}.alphas"), shapes[layer][0], f"{path}, {layer}")
        tensor = read(name)
        if tensor.is_floating_point() and (bad := int(tensor.isnan().sum())):
            raise InputError(f"{path}: {name}: {bad:,} of {tensor.numel():,} values are NaN")
        return tensor

    provenance = {"source": path.name, "layout": "TerDiT"}
    plain = {name: shapes.get(name.removesuffix(".weight"), shape) for name, (shape, _) in headers.items()}
    plain = {name: shape for name, shape in plain.items() if not name.endswith(".alphas")}
    known = large_dit.find_config(plain, heads, sample_size)
    with staged(Path(output), overwrite) as folder:
        write_tensors(folder, entries, get)
        linears = [name.removesuffix(".weight") for name in entries if name.endswith(".weight")]
        config = make_config(dict.fromkeys(shapes, spec), linears, provenance, {})
        write_json(folder / "config.json", {**(known or {}), "quantization_config": config.to_dict()})
    return shapes


def ternary_layers(headers: Headers, where: Path) -> dict[str, tuple[int, int]]:
    """(N, K) of the layers of the layout. Raises InputError when there are none, or one disagrees with itself."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, (shape, dtype) in headers.items():
        layer, _, key = name.rpartition(".")
        if key == "weight" and dtype == torch.uint8 and f"{layer}.alphas" not in headers:
            raise InputError(f"{where}: {name}: uint8 {list(shape)}: expected {layer}.alphas beside it, found none")
        if key != "alphas":
            continue
        shape, dtype = headers.get(f"{layer}.weight", ((), torch.bool))
        if len(shape) != 2 or not all(shape) or dtype != torch.uint8:
            found = f"{dtype} {list(shape)}" if shape else "no such tensor"
            raise InputError(f"{where}: {layer}.weight: expected uint8 [N/4, K] beside its alphas, found {found}")
        n, counts = 4 * shape[0], torch.Size(headers[name][0]).numel()
        bias = headers.get(f"{layer}.bias", ((n,), dtype))[0]
        if counts not in (1, n) or bias != (n,):
            expected, found = f"1 or {n} alphas and a bias [{n}]", f"{counts} and {list(bias)}"
            raise InputError(f"{where}: {layer} [{n}, {shape[1]}]: expected {expected}, found {found}")
        shapes[layer] = (n, shape[1])
    if not shapes:
        raise InputError(f"{where}: no layer with uint8 weights and alphas; expected a ternary checkpoint of TerDiT")
    return shapes


def unpack_rows(packed: Tensor, where: str = "weight") -> Tensor:
    """uint8 [N/4, K] with rows N/4 apart -> codes uint8 [N, K]: 0, 1, 2 for -1, 0, 1. Raises InputError for a 3."""
    codes = torch.cat([(packed >> shift) & 3 for shift in SHIFTS])
    if bad := int((codes == 3).sum()):
        raise InputError(f"{where}: {bad:,} of {codes.numel():,} codes are 3, which is none; another layout?")
    return codes


def _scale(alphas: Tensor, n: int, where: str) -> Tensor:
    """float32 [N]."""
    if not torch.isfinite(alphas).all():
        raise InputError(f"{where}: alphas are NaN or infinite")
    return alphas.float().flatten().expand(n).clone()


def _open(path: Path) -> tuple[Headers, Callable[[str], Tensor]]:
    """Shape and dtype of every tensor in a file, and what reads one."""
    refuse_pickle(path)
    found = read_header(path)
    if odd := [name for name, (_, dtype) in found.items() if dtype not in DTYPES]:
        raise InputError(f"{path}: {odd[0]} is of type {found[odd[0]][1]}; expected one of {', '.join(DTYPES)}")

    def read(name: str) -> Any:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    return {name: (shape, DTYPES[dtype]) for name, (shape, dtype) in found.items()}, read
