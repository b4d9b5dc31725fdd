"""`norm_quant`, `gate_norm_quant` and `act_quant` for NVIDIA GPUs, in Gluon: how their kernels are launched."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..norm_quant import Norm
from ..quant_token import TINY
from ..transform import Transform
from .gluon_act import act_quant_kernel
from .gluon_layout import LANE, pieces
from .gluon_norm import norm_quant_kernel
from .once import Once
from .rows import aligned_rows, row_stride
from .tiles import overlap

MAX_HELD = 96
"""Most channels that one thread holds; more do not fit its registers."""

_NORM = (
    (1280, 2, 1, 128, 4), (1536, 2, 1, 168, 2), (2304, 2, 2, 128, 2), (3072, 2, 2, 128, 2), (6144, 2, 4, 128, 1),
    (16384, 1, 8, 128, 1),
)  # fmt: skip
_ACT = (
    (1280, 2, 1, 96, 4), (2304, 2, 2, 128, 1), (3072, 2, 2, 168, 1), (4608, 1, 2, 112, 1), (6144, 1, 4, 96, 1),
    (13824, 1, 8, 80, 1),
)  # fmt: skip
SHAPES = {"norm": _NORM, "act": (*_ACT, (16384, 1, 8, 96, 1)), "prefixed": (*_ACT, (16384, 1, 8, 80, 1))}
"""Up to so many channels: tokens and warps of a team, registers of a thread and most teams of a program; for norms, for
activations, and for those behind a prefix, which is not activated. Measured on an H200."""

STAGED_BYTES = {"norm": 48 * 1024, "act": 20 * 1024, "prefixed": 20 * 1024}
"""Vectors that take less than this are staged (`gluon_vectors`); with more, too few programs would be resident, and
without a norm there is little to wait for."""

MIN_PROGRAMS = 96
"""Programs that are not joined to have more teams: a large GPU has 132 multiprocessors."""

SCHEDULERS = 528
"""Those of a large GPU: with fewer warps, some would have nothing to do."""


@cache
def launch_options(
    k: int, block_size: int, kind: str, dtype: torch.dtype = torch.bfloat16, fp4: bool = False, regular: bool = False
) -> dict[str, Any]:
    """Tokens and warps of a team, registers of a thread, channels of a block in it, how they are rotated
    (`gluon_rotation`), and most TEAMS. kind: one of `SHAPES`.

    None of it may depend on M: the order of the sums, and so a token's codes, follow from it.
    """
    rows, warps, most, teams = next((shape[1:] for shape in SHAPES[kind] if k <= shape[0]), (1, 16, 128, 1))
    registers = None if fp4 or 0 < block_size < 64 else most  # these take more
    # A product rounds to bfloat16, which an input in it has been through.
    product = 0 if dtype != torch.bfloat16 else 1 if kind != "norm" or fp4 or regular or block_size < 64 else 2
    held = 16 if product == 0 else LANE if product == 2 else max(LANE, block_size // 4)
    return {"R": rows, "num_warps": warps, "maxnreg": registers, "HELD": held, "PRODUCT": product, "TEAMS": teams}


def are_few(m: int, options: dict[str, Any]) -> bool:
    """Whether teams have half as many of m tokens; no result depends on it."""
    return bool(options["R"] == 2 and m * options["num_warps"] <= SCHEDULERS)


def teams_for(m: int, tokens: int, most: int, sample: int = 0) -> int:
    """Teams of a program, of `tokens` tokens each; no result depends on it. sample: tokens of a sample, of which a
    program has no other; 0 is any number."""
    while most > 1 and (m < most * tokens * MIN_PROGRAMS or sample % (most * tokens)):
        most //= 2
    return most


@cache
def limits(k: int, prefix: int, block_size: int) -> str | None:
    """Why these kernels do not take tokens of k channels; None when they do."""
    if prefix % max(16, block_size):
        return f"a prefix of {prefix} columns ends inside of a block"
    for kind in SHAPES:
        options = launch_options(k, block_size, kind)
        covered = pieces(k, prefix, options["R"], options["num_warps"], block_size)
        channels = sum(width for _, width, _ in covered) * options["R"] // (32 * options["num_warps"])
        if len(covered) > 6 or channels > MAX_HELD:
            return f"K={k} does not fit"
    return None


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else row_stride(rows)


_compiled = Once()


def _launch(
    kernel: Any,
    programs: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    constants: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Launch on tensors that `aligned_rows` has seen; compiled once for every set of dtypes and constants.

    Triton would examine every argument again at every call, which takes longer than many of these kernels.
    """
    limits = {"num_warps": options["num_warps"] * options["TEAMS"], "maxnreg": options["maxnreg"]}
    constants = (*constants, *(options[name] for name in ("R", "FEW", "TEAMS", "HELD", "PRODUCT", "STAGED")))
    types = [None if t is None else t.dtype for t in tensors]
    key = (kernel, torch.cuda.current_device(), *limits.values(), constants, *types)
    compiled = _compiled.get(key)
    if compiled is None:
        more = overlap(next(t.device for t in tensors if t is not None))
        compiled = _compiled.make(key, partial(kernel[programs], *tensors, *numbers, *constants, **limits, **more))
    if compiled is not None:
        compiled[programs](*tensors, *numbers, *constants)


def run_act(x: Tensor, act: str, transform: Transform, prefix: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """`act_quant` for tokens of k channels."""
    codes, scale = transform.empty(x, k)
    m, p = x.shape[0], 0 if prefix is None else prefix.shape[1]
    kind = "prefixed" if p else "act"
    options = _options(k, kind, x.dtype, transform)
    if m:
        x, prefix = aligned_rows(x), None if prefix is None else aligned_rows(prefix)
        vectors = _vectors(transform)
        tensors = (x, prefix, *vectors, codes, scale)
        numbers = (_stride(x), _stride(prefix), m)
        constants = (act, k, p, *_constants(transform))
        few = are_few(m, options)
        tokens = options["R"] // (1 + few)
        teams = teams_for(m, tokens, options["TEAMS"])
        options = options | {"FEW": few, "TEAMS": teams, "STAGED": is_staged(k, kind, *vectors)}
        programs = (-(-m // (tokens * teams)), 1, 1)
        _launch(act_quant_kernel, programs, tensors, numbers, constants, options)
    return codes, scale


def run_norm(stream: list[Tensor], norm: Norm, transform: Transform) -> tuple[Tensor, ...]:
    """`norm_quant` of [x], or `gate_norm_quant` of [residual, branch, gate?]."""
    m, k = stream[0].shape
    codes, scale = transform.empty(stream[0], k)
    h = torch.empty((m, k), dtype=stream[0].dtype, device=stream[0].device) if len(stream) > 1 else None
    if m:
        options = _options(k, "norm", stream[0].dtype, transform)
        samples = next((len(rows) for rows in (*norm.mod, *stream[2:])), 1)
        # Tokens that share a sample's rows; 0 where all do.
        shared = m // samples if samples > 1 else 0
        x, branch, gate = [*map(aligned_rows, stream), None, None][:3]
        shift, mod_scale = map(aligned_rows, norm.mod) if norm.mod else (None, None)
        weight, bias = [*map(aligned_rows, norm.affine), None, None][:2]
        vectors = (shift, mod_scale, weight, bias, *_vectors(transform))
        tensors = (x, branch, gate, h, *vectors, codes, scale)
        numbers = (*map(_stride, (x, branch, gate, shift, mod_scale)), m, shared or m, norm.eps)
        few = are_few(m, options)
        tokens = options["R"] // (1 + few)
        alone = shared % tokens == 0 and samples < 1 << 16  # a grid is no higher
        constants = (norm.kind == "layer", k, alone, *_constants(transform))
        teams = teams_for(m, tokens, options["TEAMS"], shared if alone else 0)
        options = options | {"FEW": few, "TEAMS": teams, "STAGED": is_staged(k, "norm", *vectors)}
        each = tokens * teams
        programs = (-(-(shared or m) // each), samples, 1) if alone else (-(-m // each), 1, 1)
        _launch(norm_quant_kernel, programs, tensors, numbers, constants, options)
    return (codes, scale) if h is None else (h, codes, scale)


def _options(k: int, kind: str, dtype: torch.dtype, transform: Transform) -> dict[str, Any]:
    regular = transform.hadamard_kind == "regular"
    return launch_options(k, transform.block_size, kind, dtype, transform.fp4_group is not None, regular)


def is_staged(k: int, kind: str, *vectors: Tensor | None) -> bool:
    """Whether these wait in shared memory. kind: one of `SHAPES`."""
    return 0 < k * sum(0 if vector is None else vector.element_size() for vector in vectors) < STAGED_BYTES[kind]


def _vectors(transform: Transform) -> tuple[Tensor | None, Tensor | None]:
    pre_scale, signs = transform.pre_scale, transform.signs
    return None if pre_scale is None else aligned_rows(pre_scale), None if signs is None else aligned_rows(signs)


def _constants(transform: Transform) -> tuple[Any, ...]:
    """INT8, FP4, TINY, BLOCK and REGULAR."""
    int8, block = transform.code_dtype == torch.int8, transform.block_size
    return int8, transform.fp4_group, TINY, block, transform.hadamard_kind == "regular" and block > 0
