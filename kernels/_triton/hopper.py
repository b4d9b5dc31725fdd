"""When int8 products run the Hopper kernel of `int8_hopper.py`, and with which tile; imports no Gluon.

The portable Triton kernel gives the same bits: which of the two runs is a matter of speed alone. Launch options with
`"variant": "hopper"` are for the Hopper kernel, all others for the portable one.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import launch_table
from .gluon_files import GluonFile

Options = dict[str, Any]

PROCESSORS = 132
"""Of an H100 SXM or H200: what the cost of a shape is estimated for."""
EPILOGUE_K = 385
"""An epilogue costs as much as this many terms of the sum (H200: 1.8 us and 4.7 ns a term, tile 256 x 128)."""


class Ending(NamedTuple):
    """What follows the scaled sums of a product: a low-rank branch; the bias; gate and residual.

    residual: y.dtype [M, N]; gate: float [B, N]; tokens: of a sample, where there is a gate
    low, up, owner: as `int8_linear_low_rank` takes them
    """

    residual: Tensor | None = None
    gate: Tensor | None = None
    tokens: int = 0
    low: Tensor | None = None
    up: Tensor | None = None
    owner: Tensor | None = None

    def unit(self, n: int) -> int:
        """Columns of y, of n, that are one layer's."""
        return n if self.owner is None else n // len(self.owner)


KERNELS = GluonFile("int8_hopper", "int8 products run the portable Triton kernel", hopper=True)


def tile(
    nc: int, cm: int, bn: int, stages: int, cbufs: int, group_m: int = 8, programs: int = 1, bk: int = 128
) -> Options:
    """Launch options: nc warpgroups of cm rows, bn columns, load stages, store buffers, programs on one processor."""
    sizes = {"NC": nc, "CM": cm, "BN": bn, "BK": bk, "STAGES": stages, "GROUP_M": group_m}
    return {"variant": "hopper", **sizes, "CBUFS": cbufs, "PROGRAMS": programs}


STORED = (
    tile(2, 128, 128, 4, 1),
    tile(2, 128, 128, 3, 2),
    tile(3, 64, 128, 4, 2),
    tile(2, 64, 192, 4, 3),
    tile(2, 64, 256, 4, 1),
    tile(2, 64, 128, 5, 2),
    tile(1, 128, 128, 3, 1, programs=2),
)
"""Tiles of `int8_linear`."""

ADDED = (
    tile(2, 128, 128, 3, 2),
    tile(3, 64, 128, 4, 2),
    tile(2, 64, 192, 4, 3),
    tile(2, 64, 256, 3, 4),
    tile(2, 64, 128, 5, 2),
    tile(1, 128, 128, 5, 2, programs=2, bk=64),
)
"""Tiles of `int8_linear_add`: their store buffers hold the residual of the whole tile."""

GROUPS = (2, 4, 8, 16)
"""Tile rows that share the second-level cache, worth measuring."""


def cost(options: Options, m: int, n: int, k: int) -> float:
    """Estimated time of a product with these options, comparable between options only.

    Waves of tiles, times the size of one; small tiles load more bytes for each product.
    """
    bm, bn = options["NC"] * options["CM"], options["BN"]
    waves = -(-(-(-m // bm) * -(-n // bn)) // PROCESSORS)
    # With two programs on a processor the epilogue of one hides under the products of the other.
    epilogue = EPILOGUE_K if options["PROGRAMS"] == 1 else EPILOGUE_K / 3
    return waves * bm * bn * (k + epilogue) * (1 + 16 * (1 / bm + 1 / bn))


@cache
def heuristic(op: str, m: int, n: int, k: int, unit: int = 0) -> Options | None:
    """The tile with the least estimated cost; None for so few tokens that the portable kernel is faster, or where no
    tile is part of one layer of `unit` columns (0: it may be of several)."""
    if m < 256 or m * n < 128 * 128 * PROCESSORS:
        return None
    tiles = ADDED if op == "int8_linear_add" else STORED
    fitting = [options for options in tiles if unit % options["BN"] == 0]
    return min(fitting, key=lambda options: cost(options, m, n, k)) if fitting else None


def candidates(op: str, m: int, n: int, k: int) -> list[Options]:
    """Launch options worth measuring on the current GPU; none where the kernel does not run."""
    if not torch.cuda.is_available() or m < 256 or k % 16 or n % 8:
        return []
    if KERNELS.on(torch.device("cuda", torch.cuda.current_device())) is None:
        return []
    return [{**t, "GROUP_M": g} for t in (ADDED if op == "int8_linear_add" else STORED) for g in GROUPS]


def note(op: str, device: torch.device, **_: Any) -> str | None:
    """For `dispatch.explain`: why the Hopper kernel is left out on a GPU that it is made for."""
    return KERNELS.note(device)


def launch(op: str, tensors: tuple[Any, ...], y: Tensor, options: Options | None, ending: Ending = Ending()) -> bool:
    """Run the Hopper kernel where it can run and is due; False: the caller runs the portable one.

    op: whose tiles are meant, `int8_linear_add` with a residual, else `int8_linear`
    tensors: codes, scale, weight, weight_scale, bias or None, all dense
    options: of the launch table, None when it has none
    """
    if (options is not None and "variant" not in options) or (kernels := KERNELS.on(y.device)) is None:
        return False
    (m, k), n = tensors[0].shape, y.shape[1]
    unit = 0 if ending.owner is None else ending.unit(n)
    if options is None or unit % options["BN"]:
        options = heuristic(op, m, n, k, unit)
    if options is None or k % 16 or n % 8 or y.itemsize != 2 or not _is_loadable(ending.low, ending.up):
        return False
    addresses = 0
    for tensor in (*tensors, ending.residual, ending.low, ending.up):
        addresses |= 0 if tensor is None else tensor.data_ptr()
    if addresses % 16:
        return False
    try:
        kernels.launch(*tensors, y, options, ending)
    except Exception as error:
        if launch_table.is_forced(op):  # while tuning, a kernel that this Triton cannot compile is a candidate less
            raise
        KERNELS.leave(y.device, error)
        return False
    return True


def _is_loadable(low: Tensor | None, up: Tensor | None) -> bool:
    """Whether a branch, if there is one, can be multiplied as it lies in memory."""
    if low is None or up is None:
        return True
    alike = low.dtype == up.dtype and low.itemsize == 2
    return alike and up.shape[1] % 8 == 0 and low.stride(0) % 8 == 0 and low.stride(1) == 1
