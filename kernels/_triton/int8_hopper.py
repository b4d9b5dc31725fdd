"""Int8 x int8 products on Hopper, in Gluon: what no other file may import, because not every Triton has Gluon.

One warp loads tiles by TMA, one to three warpgroups multiply (asynchronous wgmma) and store by TMA; every program walks
over output tiles, so that the loads of the next tile run under the epilogue of this one. A tile is [NC * CM, BN], CM
rows for each warpgroup. Triton's integer wgmma is at most 128 columns wide: a wider tile has two accumulators.
The arithmetic after the sum is that of `tiles.scaled`, step by step, so that the result has the same bits.

A low-rank branch is some more blocks of the loop, in the same buffers, whose products continue in the scaled sums.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gluon_ranks import as_ranks, load_ranks, scaled_sums, vector
from .gluon_rows import await_inputs
from .hopper import Ending
from .once import Once
from .tiles import ROUND_EACH_STEP, overlap


@gluon.jit
def tile_start(tile, M, N, GROUP_M: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """First row and column of a tile, walking GROUP_M tile rows at a time as `tiles.tile_ids` does."""
    num_m = gl.cdiv(M, BM)
    per_group = GROUP_M * gl.cdiv(N, BN)
    first = (tile // per_group) * GROUP_M
    height = gl.minimum(num_m - first, GROUP_M)
    inside = tile % per_group
    return (first + inside % height) * BM, (inside // height) * BN


@gluon.jit
def load_tiles(
    a_desc, b_desc, low_desc, up_desc, owner_ptr, a_bufs, b_bufs, b1_bufs, ready, empty, M, N, K, UNIT,
    RANKS: gl.constexpr, NC: gl.constexpr, CM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The loading warp: blocks of K, and of the ranks of the layer that a tile belongs to, into a ring of buffers.

    owner_ptr: the layer of every UNIT columns of y; None: there is one
    """
    BM: gl.constexpr = NC * CM
    WIDTH: gl.constexpr = 128 if BN > 128 else BN
    BOX: gl.constexpr = BN - 128 if BN > 128 else BN
    blocks = gl.cdiv(K, BK)
    at = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        row, col = tile_start(tile, M, N, GROUP_M, BM, BN)
        for k in range(blocks):
            # A running count gives slot and phase; choosing them by predicate made the warps wait for ever.
            slot = at % STAGES
            mbarrier.wait(empty.index(slot), ((at // STAGES) & 1) ^ 1)
            bar = ready.index(slot)
            mbarrier.expect(bar, (BM + BN) * BK)
            for c in gl.static_range(NC):
                tma.async_copy_global_to_shared(a_desc, [row + c * CM, k * BK], bar, a_bufs.index(slot * NC + c))
            b = b_bufs.index(slot)
            for c in gl.static_range(WIDTH // BOX):
                part = b if WIDTH == BOX else b.slice(c * BOX, BOX, dim=0)
                tma.async_copy_global_to_shared(b_desc, [col + c * BOX, k * BK], bar, part)
            if BN > WIDTH:
                tma.async_copy_global_to_shared(b_desc, [col + WIDTH, k * BK], bar, b1_bufs.index(slot))
            at += 1
        if RANKS > 0:
            first = 0
            if owner_ptr is not None:
                first = gl.load(owner_ptr + col // UNIT).to(gl.int32) * RANKS
            for r in range(0, RANKS, BK // 2):
                slot = at % STAGES
                mbarrier.wait(empty.index(slot), ((at // STAGES) & 1) ^ 1)
                bar = ready.index(slot)
                mbarrier.expect(bar, (BM + BN) * BK)
                load_ranks(
                    low_desc, up_desc, a_bufs, b_bufs, b1_bufs, bar, slot, row, col, first, r, NC, CM, BN
                )  # fmt: skip
                at += 1


@gluon.jit
def store_chunk(
    acc, s, c_desc, c_buf, weight_scale_ptr, bias_ptr, gate_ptr, row, col, M, N, TOKENS, GATE_STRIDE,
    HAS_BIAS: gl.constexpr, HAS_GATE: gl.constexpr, ONE_SAMPLE: gl.constexpr, ADD: gl.constexpr, EVEN_N: gl.constexpr,
    PENDING: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scale [CM, CHUNK] sums (those in fp32 are), put them into c_buf and store it; ADD: c_buf holds the residual."""
    columns = col + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    if acc.dtype == gl.int32:
        y = acc.to(gl.float32) * gl.expand_dims(s, 1)
        y = y * gl.expand_dims(vector(weight_scale_ptr, columns, N, EVEN_N), 0)
    else:
        y = acc
    if HAS_BIAS:
        y = y + gl.expand_dims(vector(bias_ptr, columns, N, EVEN_N), 0)
    if HAS_GATE:
        if ONE_SAMPLE:
            sample = (gl.minimum(row, M - 1) // TOKENS).to(gl.int64)
            y = y * gl.expand_dims(vector(gate_ptr + sample * GATE_STRIDE, columns, N, EVEN_N), 0)
        else:
            rows = gl.minimum(row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, LAYOUT)), M - 1)
            at = gl.expand_dims((rows // TOKENS).to(gl.int64) * GATE_STRIDE, 1) + gl.expand_dims(columns, 0)
            y = y * gl.load(gate_ptr + at, mask=gl.expand_dims(columns < N, 0), other=0.0).to(gl.float32)
    if ADD:
        y = y + c_buf.load(LAYOUT).to(gl.float32)
    else:
        tma.store_wait(pendings=PENDING)
        gl.thread_barrier()
    c_buf.store(y.to(c_desc.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(c_desc, [row, col], c_buf)


@gluon.jit
def store_part(
    acc, s, c_desc, c_bufs, weight_scale_ptr, bias_ptr, gate_ptr, row, col, M, N, TOKENS, GATE_STRIDE,
    HAS_BIAS: gl.constexpr, HAS_GATE: gl.constexpr, ONE_SAMPLE: gl.constexpr, ADD: gl.constexpr, EVEN_N: gl.constexpr,
    FIRST: gl.constexpr, CBUFS: gl.constexpr, WHICH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Store one accumulator in chunks of 64 columns; FIRST: chunks of the tile before it."""
    if acc.shape[1] == 64:
        at: gl.constexpr = WHICH * CBUFS + FIRST % CBUFS
        store_chunk(
            gl.convert_layout(acc, LAYOUT, assert_trivial=True), s, c_desc, c_bufs.index(at),
            weight_scale_ptr, bias_ptr, gate_ptr, row, col, M, N, TOKENS, GATE_STRIDE,
            HAS_BIAS, HAS_GATE, ONE_SAMPLE, ADD, EVEN_N, CBUFS - 1, LAYOUT,
        )  # fmt: skip
    else:
        parts = gl.split(gl.permute(gl.reshape(acc, (acc.shape[0], 2, 64)), (0, 2, 1)))
        for i in gl.static_range(2):
            store_chunk(
                gl.convert_layout(parts[i], LAYOUT, assert_trivial=True), s, c_desc,
                c_bufs.index(WHICH * CBUFS + (FIRST + i) % CBUFS),
                weight_scale_ptr, bias_ptr, gate_ptr, row, col + i * 64, M, N, TOKENS, GATE_STRIDE,
                HAS_BIAS, HAS_GATE, ONE_SAMPLE, ADD, EVEN_N, CBUFS - 1, LAYOUT,
            )  # fmt: skip


@gluon.jit
def load_residual(
    r_desc, c_bufs, loaded, row, col, CM: gl.constexpr, BN: gl.constexpr, CBUFS: gl.constexpr, WHICH: gl.constexpr
):
    """The residual arrives under the main loop, once the stores of the last tile have left its buffers."""
    tma.store_wait(pendings=0)
    gl.thread_barrier()
    bar = loaded.index(WHICH)
    mbarrier.expect(bar, CM * BN * 2)
    for c in gl.static_range(BN // 64):
        tma.async_copy_global_to_shared(r_desc, [row, col + c * 64], bar, c_bufs.index(WHICH * CBUFS + c))


@gluon.jit
def multiply(
    r_desc, c_desc, low_desc, up_desc, scale_ptr, weight_scale_ptr, bias_ptr, gate_ptr, a_bufs, b_bufs, b1_bufs, c_bufs,
    ready, empty, loaded, M, N, K, TOKENS, GATE_STRIDE,
    HAS_BIAS: gl.constexpr, HAS_GATE: gl.constexpr, ONE_SAMPLE: gl.constexpr, ADD: gl.constexpr, EVEN_N: gl.constexpr,
    RANKS: gl.constexpr, NC: gl.constexpr, CM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, CBUFS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: rows WHICH * CM and on of every tile."""
    BM: gl.constexpr = NC * CM
    WIDTH: gl.constexpr = 128 if BN > 128 else BN
    WIDTH1: gl.constexpr = BN - 128 if BN > 128 else BN
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    SUMS1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH1, 32])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    # With sums of two types in two accumulators the assembler, else, waits for every product.
    EARLY: gl.constexpr = RANKS > 0 and BN > WIDTH
    blocks = gl.cdiv(K, BK)
    at = 0
    walked = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        row, col = tile_start(tile, M, N, GROUP_M, BM, BN)
        row += WHICH * CM
        acc = gl.zeros((CM, WIDTH), gl.int32, SUMS)
        if BN > WIDTH:
            acc1 = gl.zeros((CM, WIDTH1), gl.int32, SUMS1)
        if ADD and EARLY:
            load_residual(r_desc, c_bufs, loaded, row, col, CM, BN, CBUFS, WHICH)
        for k in range(blocks):
            slot = at % STAGES
            mbarrier.wait(ready.index(slot), (at // STAGES) & 1)
            a = a_bufs.index(slot * NC + WHICH)
            t = warpgroup_mma(a, b_bufs.index(slot).permute((1, 0)), acc, is_async=True)
            if BN > WIDTH:
                t1 = warpgroup_mma(a, b1_bufs.index(slot).permute((1, 0)), acc1, is_async=True)
                acc, acc1 = warpgroup_mma_wait(num_outstanding=2, deps=(t, t1))
            else:
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(t,))
            if k > 0:
                # The products of the block before have ended: its buffers are free.
                mbarrier.arrive(empty.index((at - 1) % STAGES), count=1)
            elif ADD and not EARLY:
                load_residual(r_desc, c_bufs, loaded, row, col, CM, BN, CBUFS, WHICH)
            at += 1
        rows = row + gl.arange(0, CM, layout=gl.SliceLayout(1, LAYOUT))
        s = gl.load(scale_ptr + rows, mask=rows < M, other=0.0)
        if BN > WIDTH:
            acc, acc1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc, acc1))
        else:
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((at - 1) % STAGES), count=1)
        if RANKS > 0:
            acc = scaled_sums(acc, s, weight_scale_ptr, col, N, EVEN_N)
            if BN > WIDTH:
                acc1 = scaled_sums(acc1, s, weight_scale_ptr, col + WIDTH, N, EVEN_N)
            for r in gl.static_range(0, RANKS, BK // 2):
                slot = at % STAGES
                mbarrier.wait(ready.index(slot), (at // STAGES) & 1)
                a = as_ranks(a_bufs.index(slot * NC + WHICH), low_desc, RANKS - r)
                b = as_ranks(b_bufs.index(slot), up_desc, RANKS - r)
                t = warpgroup_mma(a, b.permute((1, 0)), acc, is_async=True)
                if BN > WIDTH:
                    b1 = as_ranks(b1_bufs.index(slot), up_desc, RANKS - r)
                    t1 = warpgroup_mma(a, b1.permute((1, 0)), acc1, is_async=True)
                    acc, acc1 = warpgroup_mma_wait(num_outstanding=0, deps=(t, t1))
                else:
                    acc = warpgroup_mma_wait(num_outstanding=0, deps=(t,))
                mbarrier.arrive(empty.index(slot), count=1)
                at += 1
        if ADD:
            mbarrier.wait(loaded.index(WHICH), walked & 1)
        store_part(
            acc, s, c_desc, c_bufs, weight_scale_ptr, bias_ptr, gate_ptr, row, col, M, N, TOKENS, GATE_STRIDE,
            HAS_BIAS, HAS_GATE, ONE_SAMPLE, ADD, EVEN_N, 0, CBUFS, WHICH, LAYOUT,
        )  # fmt: skip
        if BN > WIDTH:
            store_part(
                acc1, s, c_desc, c_bufs, weight_scale_ptr, bias_ptr, gate_ptr, row, col + WIDTH, M, N, TOKENS,
                GATE_STRIDE, HAS_BIAS, HAS_GATE, ONE_SAMPLE, ADD, EVEN_N, WIDTH // 64, CBUFS, WHICH, LAYOUT,
            )  # fmt: skip
        walked += 1  # noqa: SIM113
    tma.store_wait(pendings=0)


PLAIN = ["M", "N", "K", "UNIT", "TOKENS", "GATE_STRIDE"]
"""Integers that no kernel is specialised for: one compiled kernel serves every shape."""


@gluon.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=["gate_ptr", "owner_ptr"])
def int8_hopper_kernel(
    a_desc, b_desc, r_desc, c_desc, low_desc, up_desc, scale_ptr, weight_scale_ptr, bias_ptr, gate_ptr, owner_ptr,
    M, N, K, UNIT, TOKENS, GATE_STRIDE,
    HAS_BIAS: gl.constexpr, HAS_GATE: gl.constexpr, ONE_SAMPLE: gl.constexpr, ADD: gl.constexpr, EVEN_N: gl.constexpr,
    RANKS: gl.constexpr, NC: gl.constexpr, CM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, CBUFS: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """NC warpgroups multiply and a warp loads; REGS: registers of a multiplying thread."""
    WIDTH: gl.constexpr = 128 if BN > 128 else BN
    a_bufs = gl.allocate_shared_memory(gl.int8, [STAGES * NC, CM, BK], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(gl.int8, [STAGES, WIDTH, BK], b_desc.layout)
    if BN > WIDTH:
        b1_bufs = gl.allocate_shared_memory(gl.int8, [STAGES, BN - WIDTH, BK], b_desc.layout)
    else:
        b1_bufs = b_bufs
    c_bufs = gl.allocate_shared_memory(c_desc.dtype, [NC * CBUFS, CM, 64], c_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [NC, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=NC)
    for i in gl.static_range(NC):
        mbarrier.init(loaded.index(i), count=1)
    fence_async_shared()
    await_inputs()
    if NC == 1:
        gl.warp_specialize([
            (multiply, (
                r_desc, c_desc, low_desc, up_desc, scale_ptr, weight_scale_ptr, bias_ptr, gate_ptr, a_bufs, b_bufs,
                b1_bufs, c_bufs, ready, empty, loaded, M, N, K, TOKENS, GATE_STRIDE, HAS_BIAS, HAS_GATE, ONE_SAMPLE,
                ADD, EVEN_N, RANKS, NC, CM, BN, BK, STAGES, GROUP_M, CBUFS, 0,
            )),
            (load_tiles, (
                a_desc, b_desc, low_desc, up_desc, owner_ptr, a_bufs, b_bufs, b1_bufs, ready, empty, M, N, K, UNIT,
                RANKS, NC, CM, BN, BK, STAGES, GROUP_M,
            )),
        ], [1], [24])  # fmt: skip
    elif NC == 2:
        gl.warp_specialize([
            (multiply, (
                r_desc, c_desc, low_desc, up_desc, scale_ptr, weight_scale_ptr, bias_ptr, gate_ptr, a_bufs, b_bufs,
                b1_bufs, c_bufs, ready, empty, loaded, M, N, K, TOKENS, GATE_STRIDE, HAS_BIAS, HAS_GATE, ONE_SAMPLE,
                ADD, EVEN_N, RANKS, NC, CM, BN, BK, STAGES, GROUP_M, CBUFS, 0,
            )),
            (multiply, (
                r_desc, c_desc, low_desc, up_desc, scale_ptr, weight_scale_ptr, bias_ptr, gate_ptr, a_bufs, b_bufs,
                b1_bufs, c_bufs, ready, empty, loaded, M, N, K, TOKENS, GATE_STRIDE, HAS_BIAS, HAS_GATE, ONE_SAMPLE,
                ADD, EVEN_N, RANKS, NC, CM, BN, BK, STAGES, GROUP_M, CBUFS, 1,
            )),
            (load_tiles, (
                a_desc, b_desc, low_desc, up_desc, owner_ptr, a_bufs, b_bufs, b1_bufs, ready, empty, M, N, K, UNIT,
                RANKS, NC, CM, BN, BK, STAGES, GROUP_M,
            )),
        ], [4, 1], [REGS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (multiply, (
                r_desc, c_desc, low_desc, up_desc, scale_ptr, weight_scale_ptr, bias_ptr, gate_ptr, a_bufs, b_bufs,
                b1_bufs, c_bufs, ready, empty, loaded, M, N, K, TOKENS, GATE_STRIDE, HAS_BIAS, HAS_GATE, ONE_SAMPLE,
                ADD, EVEN_N, RANKS, NC, CM, BN, BK, STAGES, GROUP_M, CBUFS, 0,
            )),
            (multiply, (
                r_desc, c_desc, low_desc, up_desc, scale_ptr, weight_scale_ptr, bias_ptr, gate_ptr, a_bufs, b_bufs,
                b1_bufs, c_bufs, ready, empty, loaded, M, N, K, TOKENS, GATE_STRIDE, HAS_BIAS, HAS_GATE, ONE_SAMPLE,
                ADD, EVEN_N, RANKS, NC, CM, BN, BK, STAGES, GROUP_M, CBUFS, 1,
            )),
            (multiply, (
                r_desc, c_desc, low_desc, up_desc, scale_ptr, weight_scale_ptr, bias_ptr, gate_ptr, a_bufs, b_bufs,
                b1_bufs, c_bufs, ready, empty, loaded, M, N, K, TOKENS, GATE_STRIDE, HAS_BIAS, HAS_GATE, ONE_SAMPLE,
                ADD, EVEN_N, RANKS, NC, CM, BN, BK, STAGES, GROUP_M, CBUFS, 2,
            )),
            (load_tiles, (
                a_desc, b_desc, low_desc, up_desc, owner_ptr, a_bufs, b_bufs, b1_bufs, ready, empty, M, N, K, UNIT,
                RANKS, NC, CM, BN, BK, STAGES, GROUP_M,
            )),
        ], [4, 4, 1], [REGS, REGS, 24])  # fmt: skip


REGISTERS = {1: 0, 2: 240, 3: 160}
"""Multiplying warpgroups -> registers of a thread in all but the first, which has what is left."""
OPTIONS = ("NC", "CM", "BN", "BK", "STAGES", "GROUP_M", "CBUFS")


_compiled = Once()


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _boxes(options: dict[str, Any], out_bits: int) -> list[tuple[list[int], NVMMASharedLayout]]:
    """What one TMA transfer of codes, weight, residual, y, low and up covers, and how it lies in shared memory."""
    cm, bn, bk = options["CM"], options["BN"], options["BK"]
    codes = NVMMASharedLayout(swizzle_byte_width=bk, element_bitwidth=8, rank=2)
    values = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=out_bits, rank=2)
    ranks = NVMMASharedLayout(swizzle_byte_width=bk, element_bitwidth=16, rank=2)
    box, rows = ([cm, 64], values), bn - 128 if bn > 128 else bn
    return [([cm, bk], codes), ([rows, bk], codes), box, box, ([cm, bk // 2], ranks), ([rows, bk // 2], ranks)]


def _descriptor(tensor: Tensor, box: tuple[list[int], NVMMASharedLayout]) -> TensorDescriptor:
    """A descriptor without the checks of its constructor, which take microseconds; `hopper.launch` has made them."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.padding = tensor, tensor.shape, tensor.stride(), "zero"
    made.block_shape, made.layout = box
    return made


def launch(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    options: dict[str, Any],
    ending: Ending,
) -> None:
    """Write the product to y [M, N], bf16 or fp16; everything dense, K % 16 == 0, N % 8 == 0, 16-byte aligned.

    With a residual CBUFS must hold the whole tile, BN / 64. With a branch, of one 16-bit type and R % 8 == 0, no tile
    may have columns of two layers.
    """
    m, k = codes.shape
    n = weight.shape[0]
    values = tuple([options[name] for name in OPTIONS])
    nc, cm, bn = values[:3]
    residual, gate, tokens, low, up, owner = ending
    tokens = m if gate is None else tokens
    one_sample = tokens == m or tokens % cm == 0
    flags = (bias is not None, gate is not None, one_sample, residual is not None, n % bn == 0)
    vectors = (scale, weight_scale, weight_scale if bias is None else bias, weight_scale if gate is None else gate)
    sizes = (m, n, k, ending.unit(n), tokens, 0 if gate is None else gate.stride(0))
    ranks = 0 if up is None else up.shape[1]
    tiles = -(-m // (nc * cm)) * -(-n // bn)
    programs = options["PROGRAMS"]
    grid = (min(tiles, programs * _processors(y.device)), 1, 1)
    branch = (ranks, owner is None, None if low is None else low.dtype)
    key = (y.device, y.dtype, vectors[2].dtype, vectors[3].dtype, programs, flags, branch, values)
    kernel, boxes = _compiled.get(key) or (None, _boxes(options, 8 * y.itemsize))
    tensors = (codes, weight, y if residual is None else residual, y, low, up)
    described = [None if t is None else _descriptor(t, box) for t, box in zip(tensors, boxes, strict=True)]
    args = (*described, *vectors, owner, *sizes, *flags, ranks, *values, REGISTERS[nc])
    if kernel is not None:
        kernel[grid](*args)
        return
    # Two programs share the registers of a processor.
    limit = {} if programs == 1 else {"maxnreg": 65536 // (programs * 128 * (nc + 1))}
    more = {**limit, **ROUND_EACH_STEP, **overlap(y.device)}
    known = _compiled.make(key, lambda: (int8_hopper_kernel[grid](*args, num_warps=4, **more), boxes))
    if known is not None:
        known[0][grid](*args)
