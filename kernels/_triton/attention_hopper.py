"""Attention on Hopper, in Gluon: what no other file may import, because not every Triton has Gluon.

The schedule of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, algorithm 2): one warp loads keys and values by
TMA, two warpgroups of 64 queries each multiply, and the values of one block are added up while the scores of the next
are exponentiated. What differs is the tile of a head: one of D1 channels and one of D2, so that 72 channels cost what
80 do, not 128. Blocks of keys are walked from the last, which alone may reach beyond them, to the first.

The D2 tile of keys and values reaches into the next head, and the last block into the next sample. The queries are
zeros there, the scores are masked, the sums not stored: what is read must be finite, no more.
"""

# Kernel parameters are typed by what is launched, not by annotations.
# mypy: disable-error-code="no-untyped-def"

import math

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

from .gluon_rows import await_inputs
from .tiles import overlap


@gluon.jit
def load_blocks(
    k1_desc, k2_desc, v1_desc, v2_desc, k1_bufs, k2_bufs, v1_bufs, v2_bufs, ready, empty, S,
    D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp. Load j is the keys of block j and the values of block j - 1: what step j reads."""
    BYTES: gl.constexpr = BN * (D1 + D2) * 2
    first = gl.program_id(2) * S
    column = gl.program_id(1) * D
    blocks = gl.cdiv(S, BN)
    for j in range(blocks + 1):
        slot = j % STAGES
        bar = ready.index(slot)
        mbarrier.wait(empty.index(slot), ((j // STAGES) & 1) ^ 1)
        both = (j > 0) & (j < blocks)
        mbarrier.expect(bar, 2 * BYTES, pred=both)
        mbarrier.expect(bar, BYTES, pred=both == 0)
        row = first + (blocks - 1 - j) * BN
        if j < blocks:
            tma.async_copy_global_to_shared(k1_desc, [row, column], bar, k1_bufs.index(slot))
            if D2 > 0:
                tma.async_copy_global_to_shared(k2_desc, [row, column + D1], bar, k2_bufs.index(slot))
        if j > 0:
            tma.async_copy_global_to_shared(v1_desc, [row + BN, column], bar, v1_bufs.index(slot))
            if D2 > 0:
                tma.async_copy_global_to_shared(v2_desc, [row + BN, column + D1], bar, v2_bufs.index(slot))


@gluon.jit
def load_queries(q_ptr, q_buf, row, q_t, T, FIRST: gl.constexpr, D: gl.constexpr):
    """A tile of a head's queries into shared memory, zeros outside."""
    WIDTH: gl.constexpr = q_buf.shape[1]
    LANES: gl.constexpr = WIDTH // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    c = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    mask = gl.expand_dims(rows < T, 1) & gl.expand_dims(c < D, 0)
    at = gl.expand_dims(rows.to(gl.int64) * q_t, 1) + gl.expand_dims(c, 0)
    q_buf.store(gl.load(q_ptr + at, mask=mask, other=0.0))


@gluon.jit
def scores(q1, q2, k1_bufs, k2_bufs, slot, s, D2: gl.constexpr):
    """Start the product of queries and one block of keys; what s holds is lost."""
    t = warpgroup_mma(q1, k1_bufs.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
    if D2 > 0:
        t = warpgroup_mma(q2, k2_bufs.index(slot).permute((1, 0)), t, is_async=True)
    return t


@gluon.jit
def softmax(s, largest, total, scale):
    """exp2(scale * s - new largest), what sums so far shrink by, the new largest, and the sums per thread."""
    new = gl.maximum(largest, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(new, 1))
    shrink = gl.exp2(largest - new)
    return p, shrink, new, total * shrink + gl.sum(p, 1)


@gluon.jit
def shrunk(o, shrink):
    return o * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout), assert_trivial=True), 1)


@gluon.jit
def store_heads(o_ptr, o, total, row, o_t, T, FIRST: gl.constexpr, D: gl.constexpr):
    LAYOUT: gl.constexpr = o.type.layout
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    c = FIRST + gl.arange(0, o.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    y = o / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, LAYOUT), assert_trivial=True), 1)
    at = gl.expand_dims(rows.to(gl.int64) * o_t, 1) + gl.expand_dims(c, 0)
    mask = gl.expand_dims(rows < T, 1) & gl.expand_dims(c < D, 0)
    gl.store(o_ptr + at, y.to(o_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def multiply(
    q_ptr, o_ptr, q1_bufs, q2_bufs, k1_bufs, k2_bufs, v1_bufs, v2_bufs, ready, empty, scale, q_b, q_t, q_h, T, S,
    D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: 64 queries."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    SUMS1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    WIDTH2: gl.constexpr = D2 if D2 > 0 else 16
    SUMS2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH2, 16])
    LEFT1: gl.constexpr = gl.DotOperandLayout(0, SUMS1, 2)
    LEFT2: gl.constexpr = gl.DotOperandLayout(0, SUMS2, 2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    row = gl.program_id(0) * 128 + WHICH * 64
    head = gl.program_id(1)
    batch = gl.program_id(2).to(gl.int64)
    o_ptr += (batch * T * gl.num_programs(1) + head) * D
    q_ptr += batch * q_b + head * q_h
    load_queries(q_ptr, q1_bufs.index(WHICH), row, q_t, T, 0, D)
    if D2 > 0:
        load_queries(q_ptr, q2_bufs.index(WHICH), row, q_t, T, D1, D)
    fence_async_shared()
    gl.thread_barrier()
    q1 = q1_bufs.index(WHICH)
    q2 = q2_bufs.index(WHICH)
    blocks = gl.cdiv(S, BN)
    s = gl.zeros((64, BN), gl.float32, SCORES)
    o1 = gl.zeros((64, D1), gl.float32, SUMS1)
    o2 = gl.zeros((64, WIDTH2), gl.float32, SUMS2)
    largest = gl.full((64,), -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros((64,), gl.float32, gl.SliceLayout(1, SCORES))
    pin = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mbarrier.wait(ready.index(0), 0)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(scores(q1, q2, k1_bufs, k2_bufs, 0, s, D2),))
    mbarrier.arrive(empty.index(0), count=1)
    keys = (blocks - 1) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, SCORES))
    s = gl.where(gl.expand_dims(keys < S, 0), s, float("-inf"))
    p, shrink, largest, total = softmax(s, largest, total, scale)
    left1 = gl.convert_layout(p.to(dtype), LEFT1, assert_trivial=True)
    left2 = gl.convert_layout(p.to(dtype), LEFT2, assert_trivial=True)
    for j in range(1, blocks):
        slot = j % STAGES
        mbarrier.wait(ready.index(slot), (j // STAGES) & 1)
        t = scores(q1, q2, k1_bufs, k2_bufs, slot, s, D2)
        t1 = warpgroup_mma(left1, v1_bufs.index(slot), o1, is_async=True)
        if D2 > 0:
            t2 = warpgroup_mma(left2, v2_bufs.index(slot), o2, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=2, deps=(t,))
        else:
            s = warpgroup_mma_wait(num_outstanding=1, deps=(t,))
        p, shrink, largest, total = softmax(s, largest, total, scale)
        # Read by nobody: without it the assembler moves all of the arithmetic above behind the next wait.
        pin.store(total)
        # The left operands are read from registers until the products have ended.
        if D2 > 0:
            o1, o2, left1, left2 = warpgroup_mma_wait(num_outstanding=0, deps=(t1, t2, left1, left2))
            o2 = shrunk(o2, shrink)
        else:
            o1, left1 = warpgroup_mma_wait(num_outstanding=0, deps=(t1, left1))
        mbarrier.arrive(empty.index(slot), count=1)
        o1 = shrunk(o1, shrink)
        left1 = gl.convert_layout(p.to(dtype), LEFT1, assert_trivial=True)
        left2 = gl.convert_layout(p.to(dtype), LEFT2, assert_trivial=True)
    last = blocks % STAGES
    mbarrier.wait(ready.index(last), (blocks // STAGES) & 1)
    o_t = gl.num_programs(1) * D
    o1 = warpgroup_mma(left1, v1_bufs.index(last), o1)
    store_heads(o_ptr, o1, total, row, o_t, T, 0, D)
    if D2 > 0:
        o2 = warpgroup_mma(left2, v2_bufs.index(last), o2)
        store_heads(o_ptr, o2, total, row, o_t, T, D1, D)


PLAIN = ["q_b", "q_t", "q_h", "T", "S"]
"""Integers that no kernel is specialised for: one compiled kernel serves every shape."""


@gluon.jit(do_not_specialize=PLAIN)
def attention_hopper_kernel(
    q_ptr, k1_desc, k2_desc, v1_desc, v2_desc, o_ptr, scale, q_b, q_t, q_h, T, S,
    D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """128 queries of head program_id(1) of batch row program_id(2). scale: log2(e) / sqrt(d)."""
    q1_bufs = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, 64, D1], k1_desc.layout)
    k1_bufs = gl.allocate_shared_memory(k1_desc.dtype, [STAGES, BN, D1], k1_desc.layout)
    v1_bufs = gl.allocate_shared_memory(v1_desc.dtype, [STAGES, BN, D1], v1_desc.layout)
    if D2 > 0:
        q2_bufs = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, 64, D2], k2_desc.layout)
        k2_bufs = gl.allocate_shared_memory(k2_desc.dtype, [STAGES, BN, D2], k2_desc.layout)
        v2_bufs = gl.allocate_shared_memory(v2_desc.dtype, [STAGES, BN, D2], v2_desc.layout)
    else:
        q2_bufs, k2_bufs, v2_bufs = q1_bufs, k1_bufs, v1_bufs
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    await_inputs()
    gl.warp_specialize([
        (multiply, (
            q_ptr, o_ptr, q1_bufs, q2_bufs, k1_bufs, k2_bufs, v1_bufs, v2_bufs, ready, empty, scale, q_b, q_t, q_h,
            T, S, D, D1, D2, BN, STAGES, 0,
        )),
        (multiply, (
            q_ptr, o_ptr, q1_bufs, q2_bufs, k1_bufs, k2_bufs, v1_bufs, v2_bufs, ready, empty, scale, q_b, q_t, q_h,
            T, S, D, D1, D2, BN, STAGES, 1,
        )),
        (load_blocks, (
            k1_desc, k2_desc, v1_desc, v2_desc, k1_bufs, k2_bufs, v1_bufs, v2_bufs, ready, empty, S, D, D1, D2, BN,
            STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


BLOCK = 128
"""Keys of a block."""


def _descriptor(x: Tensor, width: int) -> TensorDescriptor:
    """Blocks of BLOCK rows and `width` channels of x [B, S, H, d], a head's channels beside the next one's."""
    b, s, h, d = x.shape
    layout = NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=2)
    return TensorDescriptor(x, [b * s, h * d], [x.stride(1), 1], [BLOCK, width], layout)


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these tensors cannot be loaded as the kernel does; None when they can."""
    b, s, _, d = k.shape
    rows, addresses = 0, q.data_ptr()
    for x in (k, v):
        sample, row, head, channel = x.stride()
        if channel != 1 or head != d or (b > 1 and sample != s * row):
            return "the rows of all samples do not follow each other at one distance"
        rows |= row
        addresses |= x.data_ptr()
    sample, row, head, channel = q.stride()
    if channel != 1 or (sample | row | head) % 8:
        return "queries do not start at multiples of 16 bytes"
    return "rows do not start at multiples of 16 bytes" if rows % 8 or addresses % 16 else None


def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Write `attention` without a mask to out [B * T, H * d]; bf16 or fp16, 64 to 96 channels, a multiple of 8, and
    `refusal` had nothing to say."""
    (b, t, h, d), s = q.shape, k.shape[1]
    first, second = 64, 0 if d == 64 else 16 if d <= 80 else 32
    k1, v1 = _descriptor(k, first), _descriptor(v, first)
    k2, v2 = (_descriptor(k, second), _descriptor(v, second)) if second else (k1, v1)
    attention_hopper_kernel[(-(-t // 128), h, b)](
        q, k1, k2, v1, v2, out, math.log2(math.e) / math.sqrt(d), *q.stride()[:3], t, s,
        D=d, D1=first, D2=second, BN=BLOCK, STAGES=4 if d <= 80 else 3, num_warps=4, **overlap(q.device),
    )  # fmt: skip
