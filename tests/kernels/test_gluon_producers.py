"""The Gluon producers: their butterfly step by step on a CPU, compiled for GPUs that are not here, and on a GPU.

python test_gluon_producers.py 90    # compile for this capability; one JSON line per kernel
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels import act_quant as act_module
from vdit_quant.kernels import dispatch
from vdit_quant.kernels import norm_quant as norm_module
from vdit_quant.kernels.act_quant import ACTS, GATED, act_quant
from vdit_quant.kernels.hadamard import hadamard_matrix
from vdit_quant.kernels.norm_quant import (
    NORM_QUANT,
    Norm,
    gate_norm_quant,
    gate_norm_quant_fp8,
    norm_quant,
    norm_quant_fp8,
)
from vdit_quant.kernels.quant_token_fp4 import quant_token_fp4
from vdit_quant.kernels.transform import FORMS, Transform

pytest.importorskip("triton.experimental.gluon")
from vdit_quant.kernels._triton import gluon_layout, gluon_moments, gluon_producers, gluon_rotation, gluon_sums

TILES = [(2, 1024, 1), (2, 128, 1), (1, 2048, 2), (2, 4096, 4), (1, 2048, 8)]
FEW = (1152, 5120, 13824)
MODELS = (1152, 1536, 2240, 3072, 4608, 5120, 12288, 13824, 15360)
CONSTANTS = ("R", "HELD", "PRODUCT", "TEAMS")
VECTORS = ("shift_ptr", "mod_scale_ptr", "weight_ptr", "bias_ptr", "pre_scale_ptr", "signs_ptr")
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32, "*i8": torch.int8}
ROTATIONS = [*((size, "sylvester") for size in (16, 32, 64, 128)), (16, "regular"), (64, "regular")]


def run_ptx(text: str, operands: list[Tensor], count: int | None = None) -> list[Tensor]:
    """What instructions do to operands [..., 32 lanes]: `count` results, else one for every operand."""
    count = count or len(operands)
    names: dict[str, Tensor] = {f"${count + i}": value for i, value in enumerate(operands)}
    names |= {"lane": torch.arange(32, dtype=torch.int32), "zero": torch.zeros(32)}

    def value(name: str) -> Any:
        if name in names:
            return names[name]
        if name.startswith("0f"):
            return torch.tensor([int(name[2:], 16)]).to(torch.int32).view(torch.float32)
        return int(name, 0)

    for line in re.split(r";\s*", text.strip("{} ")):
        if not line or line.startswith((".reg", "mov.u32")):
            continue
        code, _, written = line.partition(" ")
        if code == "mov.b32" and written == "zero, 0":
            continue
        if code.startswith("mma"):
            results, *groups = ([*group.split(", ")] for group in re.findall(r"{(.*?)}", written))
            dtype = torch.bfloat16 if ".bf16." in code else torch.float16
            found = multiply(*([value(n) for n in group] for group in groups), dtype=dtype)
            names.update(zip(results, found, strict=True))
            continue
        result, *rest = written.split(", ")
        names[result] = instruction(code, *map(value, rest[:3]))
    return [names[f"${i}"] for i in range(count)]


def instruction(code: str, a: Any, b: Any = None, c: Any = None) -> Tensor:
    """The result of one; bits are those of int32."""
    bits = a.view(torch.int32) if isinstance(a, Tensor) and a.dtype == torch.float32 else a
    other = b.view(torch.int32) if isinstance(b, Tensor) and b.dtype == torch.float32 else b
    if code == "popc.b32":
        return sum((bits >> i) & 1 for i in range(32))
    if code.startswith("cvt.rn."):
        dtype = torch.bfloat16 if code == "cvt.rn.bf16x2.f32" else torch.float16
        high, low = (t.to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF for t in (a, b))
        return wrapped((high << 16) | low)
    if code in ("sub.f32", "add.f32", "sub.rn.f32", "add.rn.f32"):
        second = b.view(torch.float32)
        return a.view(torch.float32) + (second if code[0] == "a" else -second)
    if code == "fma.rn.f32":
        return a * b.view(torch.float32) + c
    if code == "setp.eq.u32":
        return bits == other
    if code == "setp.ne.u32":
        return bits != other
    if code == "setp.gt.u32":
        return bits > other
    if code == "selp.b32":
        return torch.where(c, a, b)
    integers = {
        "and.b32": lambda: bits & signed(other),
        "or.b32": lambda: bits | signed(other),
        "sub.s32": lambda: bits.long() - other,
        "xor.b32": lambda: bits ^ signed(other),
        "shr.b32": lambda: (bits.long() & 0xFFFFFFFF) >> other,
        "shr.u32": lambda: (bits.long() & 0xFFFFFFFF) >> other,
        "shl.b32": lambda: bits.long() << other,
        "lop3.b32": lambda: (bits.long() & b) | c,
    }
    if code in integers:
        return wrapped(integers[code]())
    if code == "shfl.sync.bfly.b32":
        return a[..., torch.arange(32) ^ b]
    assert code in ("mov.b32", "mov.f32"), code
    return torch.full((32,), a, dtype=torch.int32) if isinstance(a, int) else a


def signed(number: Any) -> Any:
    return number - (1 << 32) if isinstance(number, int) and number >= 1 << 31 else number


def wrapped(number: Tensor) -> Tensor:
    """The lowest 32 bits."""
    number = number.long() & 0xFFFFFFFF
    return torch.where(number >= 1 << 31, number - (1 << 32), number).to(torch.int32)


def multiply(a: list[Tensor], b: list[Tensor], sums: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """mma.m16n8k16, and m16n8k8 of half as many operands, as PTX describes them.

    Lane 4 g + t has rows g and g + 8 of a, in columns 2 t and 2 t + 8 with their right neighbours; of b those as rows,
    in column g; of the sums rows g and g + 8, in columns 2 t and 2 t + 1.
    """

    def halves(packed: Tensor) -> Tensor:
        both = torch.stack([packed << 16, packed & -65536], -1) >> 16
        return both.to(torch.int16).view(dtype).float().unflatten(-2, (8, 4))  # [..., g, t, which]

    rows = [halves(t).flatten(-2) for t in a]
    left = torch.cat([torch.cat(rows[0::2], -1), torch.cat(rows[1::2], -1)], -2)
    right = torch.cat([halves(t).flatten(-2) for t in b], -1).transpose(-1, -2)
    product = left.double() @ right.double()
    before = [t.expand(*product.shape[:-2], 32).unflatten(-1, (8, 4)) for t in sums]
    parts = product.unflatten(-2, (2, 8)).unflatten(-1, (4, 2))  # [..., row / 8, g, t, which]
    return [
        (parts[..., row, :, :, which] + before[2 * row + which]).float().flatten(-2)
        for row in range(2)
        for which in range(2)
    ]


def places_of(layout: Any) -> Tensor:
    """[registers, warps, 32 lanes, 2]: the token and channel that each holds."""
    spans = []
    for bases in (layout.reg_bases, layout.warp_bases, layout.lane_bases):
        place = torch.zeros(1, 2, dtype=torch.int64)
        for step in torch.tensor(bases, dtype=torch.int64).view(-1, 2):
            place = torch.cat([place, place ^ step])
        spans.append(place)
    registers, warps, lanes = spans
    return registers[:, None, None] ^ warps[None, :, None] ^ lanes[None, None]


@pytest.mark.parametrize(("size", "kind"), ROTATIONS)
@pytest.mark.parametrize("held", [8, 16, 32, 64])
@pytest.mark.parametrize(("rows", "width", "warps"), TILES)
@pytest.mark.parametrize(("product", "error"), [(False, 1e-6), (True, 2e-3)])
def test_a_rotation_is_a_product_with_h(
    size: int, kind: str, held: int, rows: int, width: int, warps: int, product: bool, error: float
) -> None:
    layout = gluon_layout.layout_of(rows, width, warps, size, held)
    place = places_of(layout)
    x = torch.randn(rows, width, dtype=torch.float32)
    inside = x[place[..., 0], place[..., 1]]
    count = gluon_layout.held_by_thread(width, warps, size, held)
    text = gluon_rotation.rotation(width, warps, size, held, kind == "regular", product)
    results = run_ptx(text, list(inside.view(-1, count, warps, 32).unbind(1)))
    found = torch.full_like(x, float("nan"))
    found[place[..., 0], place[..., 1]] = torch.stack(results, 1).view(inside.shape)
    want = (x.double().view(-1, size) @ hadamard_matrix(size, kind).double()).view(x.shape)
    assert (found.double() - want).norm() <= error * want.norm()


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("magnitude", [5e-3, 1.0, 2e5])
@pytest.mark.parametrize(("rows", "width", "warps"), TILES)
def test_two_products_are_one_with_h_of_channels_in_another_order(
    size: int, magnitude: float, rows: int, width: int, warps: int
) -> None:
    place = places_of(gluon_layout.layout_of(rows, width, warps, size, 8))
    x = torch.randn(rows, width) * magnitude
    inside = x[place[..., 0], place[..., 1]]
    text = gluon_rotation.crosswise(size)
    results = run_ptx(text, list(inside.view(-1, 8, warps, 32).unbind(1)))
    nominal = torch.full_like(x, float("nan"))
    nominal[place[..., 0], place[..., 1]] = torch.stack(results, 1).view(inside.shape)
    # as `in_order` does it
    if width >= 256:
        found = nominal.view(rows, -1, 8, 4, 2, 4).permute(0, 1, 4, 3, 2, 5).reshape(rows, width)
    else:
        found = nominal.view(rows // 2, 2, 4, 4, 2, 4).permute(0, 4, 3, 1, 2, 5).reshape(rows, width)
    want = (x.double().view(-1, size) @ hadamard_matrix(size, "sylvester").double()).view(x.shape)
    assert (found.double() * gluon_rotation.SMALLER - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("held", [8, 16, 32])
@pytest.mark.parametrize(("rows", "width", "warps"), TILES)
def test_moments_on_tensor_cores_are_sums_of_numbers_and_of_squares(
    held: int, rows: int, width: int, warps: int
) -> None:
    place = places_of(gluon_layout.layout_of(rows, width, warps, 64, held))
    count = gluon_layout.held_by_thread(width, warps, 64, held)
    x = torch.randn(rows, width).bfloat16()
    halves = x[place[..., 0], place[..., 1]].view(torch.int16).to(torch.int64) & 0xFFFF
    packed = wrapped(halves[0::2] | (halves[1::2] << 16)).view(-1, count // 2, warps, 32)
    results = run_ptx(gluon_moments.moments_of(count), list(packed.unbind(1)), 2 * count)
    token = place[..., 0].view(-1, count, warps, 32)[:, 0]
    for first, wanted in ((0, x.double()), (count, x.double().square())):
        sums = torch.zeros(rows, dtype=torch.float64)
        sums.index_put_((token.expand_as(results[first]),), results[first].double(), accumulate=True)
        torch.testing.assert_close(sums, wanted.sum(1), rtol=1e-5, atol=1e-4)
        assert all(not rest.any() for rest in results[first + 1 : first + count])


@pytest.mark.parametrize("k", [48, 192, 576, *MODELS])
@pytest.mark.parametrize("prefix", [0, 0.2])
@pytest.mark.parametrize("kind", gluon_producers.SHAPES)
def test_pieces_cover_every_channel_once(k: int, prefix: float, kind: str) -> None:
    p = int(k * prefix) // 16 * 16
    options = gluon_producers.launch_options(k, 16, kind)
    at = 0
    for start, width, end in gluon_layout.pieces(k, p, options["R"], options["num_warps"], 16):
        assert start == at
        assert end in (p, k)
        at = min(start + width, end)
    assert at == k


@pytest.mark.parametrize(("rows", "width", "warps"), TILES)
@pytest.mark.parametrize("teams", [1, 2, 4])
def test_teams_hold_tokens_of_their_own_as_one_alone_does(rows: int, width: int, warps: int, teams: int) -> None:
    alone = places_of(gluon_layout.layout_of(rows, width, warps, 64, 16))
    place = places_of(gluon_layout.layout_of(rows, width, warps, 64, 16, teams)).unflatten(1, (teams, warps))
    for team in range(teams):
        assert torch.equal(place[:, team], alone + torch.tensor([rows * team, 0]))


@pytest.mark.parametrize(
    ("m", "sample", "few", "teams"),
    [
        (8192, 256, False, 4),
        (8192, 0, False, 4),
        (8192, 4, False, 2),
        (1024, 258, False, 1),
        (512, 256, True, 4),
        (512, 258, True, 2),
        (258, 129, True, 1),
        (1, 0, True, 1),
    ],
)
def test_a_program_has_several_teams_where_programs_are_many_and_samples_long(
    m: int, sample: int, few: bool, teams: int
) -> None:
    assert gluon_producers.are_few(m, {"R": 2, "num_warps": 1}) == few
    assert gluon_producers.teams_for(m, 2 // (1 + few), 4, sample) == teams


def test_what_two_tokens_of_a_warp_add_up_to_comes_to_the_same_lanes() -> None:
    """Of equal tokens, one in lanes 0 to 15, the other behind it."""
    values = torch.randn(8, 16).bfloat16().repeat(1, 2)
    halves = values.view(torch.int16).to(torch.int64) & 0xFFFF
    packed = wrapped(halves[0::2] | (halves[1::2] << 16))
    moments = run_ptx(gluon_moments.moments_of(8), list(packed), 16)
    for part, step in ((moments[0], int(gluon_moments.OTHER_TOKEN)), (moments[8], 18), (values[0].float(), 16)):
        one, other = run_ptx(gluon_sums.halves(step), [part], 2)
        assert torch.equal(one, other)
        assert one[:16].abs().sum() > 0
        assert not one[16:].any()
    one, other = run_ptx(gluon_sums.halves(0), [values[0].float()], 2)
    assert torch.equal(one[:16], other[16:])
    assert not other[:16].any()


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(name, kernel, types, constants, launch options); an argument without type or constant is None."""
    rows = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "M": "i32", "x_stride": "i32"}
    vectors = {"pre_scale_ptr": "*fp32"}  # with the signs in it: `join_vectors`
    mod = {"shift_ptr": "*bf16", "mod_scale_ptr": "*bf16", "shift_stride": "i32", "mod_scale_stride": "i32"}
    gate = {"branch_ptr": "*bf16", "gate_ptr": "*bf16", "h_ptr": "*bf16", "branch_stride": "i32", "gate_stride": "i32"}
    sizes = ((0, ""), (64, "sylvester"), (128, "sylvester"))
    shapes = [(k, size, kind) for k in MODELS for size, kind in sizes if k in FEW or size == 64]
    for k, size, kind in [*shapes, (3072, 64, "regular"), (1152, 16, "regular")]:
        transform = (vectors if kind != "regular" else {"signs_ptr": "*i8"}) if size else {}
        constants = {"K": k, "INT8": True, "TINY": 1e-30, "BLOCK": size, "REGULAR": kind == "regular"}
        options = gluon_producers.launch_options(k, size, "act", regular=kind == "regular")
        constants |= {name: options[name] for name in CONSTANTS}
        if k > 4000:
            for act in ("gelu_tanh", "swiglu") if size == 64 else ("gelu_tanh",):
                name, more = f"act {act} K={k} {size}{kind}", {"ACT": act, "PREFIX": 0}
                yield name, gluon_producers.act_quant_kernel, rows | transform, constants | more, options
        options = gluon_producers.launch_options(k, size, "norm", regular=kind == "regular")
        constants |= {name: options[name] for name in CONSTANTS}
        if k <= 5120:
            norm = rows | transform | mod | {"TOKENS": "i32", "eps": "fp32"}
            for alone in (True, False) if k in FEW else (True,):
                name, more = f"norm K={k} {size}{kind} alone={alone}", {"LAYER": True, "ONE": alone}
                yield name, gluon_producers.norm_quant_kernel, norm, constants | more, options
            name, more = f"few norm K={k} {size}{kind}", {"LAYER": True, "ONE": True, "FEW": True}
            if k in (1152, 2240, 3072) and size == 64 and kind != "regular":
                yield name, gluon_producers.norm_quant_kernel, norm, constants | more, options
            name, more = f"gate K={k} {size}{kind}", {"LAYER": True, "ONE": True}
            yield name, gluon_producers.norm_quant_kernel, norm | gate, constants | more, options
    options = gluon_producers.launch_options(15360, 64, "prefixed")
    constants = {"ACT": "gelu_tanh", "K": 15360, "PREFIX": 3072, "INT8": True, "TINY": 1e-30, "BLOCK": 64}
    constants |= {"REGULAR": False, **{name: options[name] for name in CONSTANTS}}
    types = rows | vectors | {"prefix_ptr": "*bf16", "prefix_stride": "i32"}
    yield "act behind a prefix", gluon_producers.act_quant_kernel, types, constants, options
    options = gluon_producers.launch_options(15360, 64, "prefixed", fp4=True)
    yield "act behind a prefix to FP4", gluon_producers.act_quant_kernel, types, {**constants, "FP4": 16}, options
    norm = rows | mod | {"TOKENS": "i32", "eps": "fp32"}
    options = gluon_producers.launch_options(1152, 0, "norm")
    constants = {"K": 1152, "INT8": True, "TINY": 1e-30, "BLOCK": 0, "REGULAR": False, "LAYER": True, "ONE": True}
    constants |= {name: options[name] for name in CONSTANTS}
    scaled = norm | {"pre_scale_ptr": "*fp32"}
    yield "norm K=1152 scaled", gluon_producers.norm_quant_kernel, scaled, constants, options
    for k, size in ((1152, 0), (1152, 128), (1536, 64), (2240, 64), (3072, 128), (5120, 0), (5120, 128)):
        options = gluon_producers.launch_options(k, size, "norm", fp4=True)
        constants = {"K": k, "INT8": True, "TINY": 1e-30, "BLOCK": size, "REGULAR": False, "LAYER": True, "ONE": True}
        constants |= {name: options[name] for name in CONSTANTS}
        for group in (0, 16):
            name, types = f"norm K={k} {size} to FP4 {group}", norm | (vectors if size else {})
            yield name, gluon_producers.norm_quant_kernel, types, constants | {"FP4": group}, options
    for k, size, group in ((4608, 0, 0), (4608, 128, 128), (13824, 64, 16), (15360, 0, 32), (15360, 128, 0)):
        options = gluon_producers.launch_options(k, size, "act", fp4=True)
        constants = {"K": k, "PREFIX": 0, "INT8": True, "TINY": 1e-30, "BLOCK": size, "REGULAR": False, "FP4": group}
        constants |= {"ACT": "gelu_tanh", **{name: options[name] for name in CONSTANTS}}
        name = f"act K={k} {size} to FP4 {group}"
        transform = vectors if size else {}
        yield name, gluon_producers.act_quant_kernel, rows | transform, constants, options
    yield from fp8_cases(rows | {"codes_ptr": "*fp8e4nv"}, norm | {"codes_ptr": "*fp8e4nv"}, gate)


def fp8_cases(
    rows: dict[str, str], norm: dict[str, str], gate: dict[str, str]
) -> Iterator[tuple[str, Any, Any, Any, Any]]:
    """As `compile_cases`; without a rotation, of which fp8 has no use."""
    constants = {"INT8": False, "TINY": 1e-30, "BLOCK": 0, "REGULAR": False}
    for k in (1152, 3072, 5120):
        options = gluon_producers.launch_options(k, 0, "norm")
        more = constants | {"K": k, "LAYER": True, "ONE": True, **{name: options[name] for name in CONSTANTS}}
        for name, types in (("norm", norm), ("gate", norm | gate)):
            yield f"{name} K={k} to fp8", gluon_producers.norm_quant_kernel, types, more, options
    for k, act, prefix in (
        (1152, "none", 0),
        (4608, "gelu_tanh", 0),
        (12288, "gelu_tanh", 0),
        (15360, "gelu_tanh", 3072),
    ):
        options = gluon_producers.launch_options(k, 0, "prefixed" if prefix else "act")
        more = constants | {"K": k, "ACT": act, "PREFIX": prefix, **{name: options[name] for name in CONSTANTS}}
        types = rows | ({"prefix_ptr": "*bf16", "prefix_stride": "i32"} if prefix else {})
        yield f"act K={k} to fp8", gluon_producers.act_quant_kernel, types, more, options


def compile_all(capability: int) -> None:
    """Print one JSON line per kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from cases._offline import inspect_cubin, pretend

    target = pretend(GPUTarget("cuda", capability, 32))
    for name, kernel, types, constants, options in compile_cases():
        if capability < 90 and (constants["K"] not in FEW or not constants["INT8"]):
            continue
        signature, fixed, attributes = {}, {}, {}
        vectors = [types[name] for name in VECTORS if name in types]
        kind = "act" if "ACT" in constants else "norm"
        staged = gluon_producers.is_staged(
            constants["K"], kind, *(torch.empty(0, dtype=DTYPES[name]) for name in vectors)
        )
        constants = {"FEW": False} | constants | {"STAGED": staged}
        for i, argument in enumerate(kernel.arg_names):
            signature[argument] = types.get(argument, "constexpr")
            if argument not in types:
                fixed[(i,)] = constants.get(argument)
            elif types[argument][0] == "*" or argument.endswith("stride"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        launch = {"num_warps": options["num_warps"] * options["TEAMS"], "maxnreg": options["maxnreg"]}
        source = GluonASTSource(kernel, signature, fixed, attributes)
        made = triton.compile(source, target=target, options=launch)
        size = sum(DTYPES[name].itemsize for name in vectors) * constants["K"] if staged else 0
        found = {
            "name": name,
            "staged": size,
            "shared": made.metadata.shared,
            **inspect_cubin(made.asm["cubin"], disassemble=True),
        }
        sys.stdout.write(json.dumps(found) + "\n")


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills_and_with_no_shared_memory_but_for_vectors(capability: int, child_environment) -> None:
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) > (30 if capability < 90 else 60)
    for kernel in kernels:
        assert kernel["shared"] <= 1.34 * kernel["staged"] + 512, kernel
        # A number or two that wait for the end: a program less on a processor would cost more.
        assert kernel.get("stack", 0) <= 24, kernel
        assert kernel.get("spills", 0) <= (6 if "alone=False" in kernel["name"] or capability < 90 else 3), kernel


@pytest.fixture
def strict() -> Iterator[None]:
    with dispatch.use(mode="auto", strict=True):
        yield


def transform_of(k: int, size: int, kind: str, dtype: torch.dtype = torch.int8) -> Transform:
    signs = (torch.randint(2, (k,), device="cuda") * 2 - 1).to(torch.int8) if size else None
    return Transform(torch.rand(k, device="cuda") + 0.5, signs, size, kind, dtype)


def listed(transform: Transform) -> list[Tensor]:
    return [t for t in (transform.pre_scale, transform.signs) if t is not None]


def rounding(dtype: torch.dtype, size: int) -> float:
    """What a scale may be off by: fp32 rounding, but bfloat16 is also rotated in bfloat16."""
    return 1e-2 if size and dtype == torch.bfloat16 else 1e-5


def assert_agree(got: tuple[Tensor, ...], want: tuple[Tensor, ...], rtol: float = 1e-5) -> None:
    """Codes within 1 (fp8: one step), most of them equal; scales to `rtol`."""
    torch.testing.assert_close(got[-1], want[-1], rtol=rtol, atol=0)
    codes, wanted = got[-2].float(), want[-2].float()
    off = (codes - wanted).abs()
    # an error of the rotation is many steps of a small float8, though none of the largest
    limit = 1.0 if got[-2].dtype == torch.int8 else wanted.abs() / 8 + (2**-9 if rtol < 1e-3 else 1.0)
    assert (off <= limit).all()
    assert (off > 0).float().mean() < (100 * rtol if rtol < 1e-3 else 0.1)


def rotations_of(k: int) -> list[tuple[int, str]]:
    """None, one of Hadamard's, and a third that depends on k."""
    fits = [(size, kind) for size, kind in ROTATIONS if k % size == 0]
    return [(0, ""), fits[-1], fits[k // 16 % len(fits)]]


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("k", [48, 192, *MODELS])
def test_act_quant_equals_its_reference(k: int) -> None:
    runs = [(1, "gelu_tanh", torch.bfloat16), (129, "swiglu", torch.float16), (7, "none", torch.float32)]
    for i, (size, kind) in enumerate(rotations_of(k)):
        m, act, dtype = runs[(i + k // 64) % 3]
        x = (torch.randn(m, 3 * k, device="cuda") * 2).to(dtype)[:, k : 3 * k if act == "swiglu" else 2 * k]
        transform = transform_of(k, size, kind)
        assert gluon_producers.limits(k, 0, size) is None
        got = act_quant(x, act, transform.pre_scale, transform.signs, size, kind)
        assert_agree(got, act_module._reference(x, act, transform), rounding(dtype, size))


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("k", [1152, 4608])
def test_what_is_rotated_in_bfloat16_is_nearly_as_exact_as_in_float32(k: int, size: int) -> None:
    """To a thirtieth of the error that eight bits make anyway, and without a bias."""
    x, transform = torch.randn(2048, k, device="cuda").bfloat16(), transform_of(k, size, "sylvester")
    exact = x.double() * transform.pre_scale.double() * transform.signs
    exact = (exact.view(-1, size) @ hadamard_matrix(size, "sylvester").to(exact)).view(x.shape) * size**-0.5
    errors = []
    for codes, scale in (act_quant(x, "none", *listed(transform), size, "sylvester"), transform.quantize(x.float())):
        found = codes.double() * scale.double()[:, None]
        errors.append((found - exact).norm() / exact.norm())
        assert abs((found * exact).sum() / (exact * exact).sum() - 1) < 2e-5
    assert errors[0] < 1.033 * errors[1]


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("k", [1152, 3072])
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
def test_a_mean_far_larger_than_the_deviation_costs_few_digits(k: int, mean: float) -> None:
    """The variance of bfloat16 is a difference of two sums where the kernel rotates."""
    x = (torch.randn(512, k, device="cuda") + mean).bfloat16()
    transform, norm = transform_of(k, 64, "sylvester"), Norm([], [], "layer", 1e-6)
    wide = torch.nn.functional.layer_norm(x.double(), (k,), eps=1e-6) * transform.pre_scale * transform.signs
    exact = (wide.view(-1, 64) @ hadamard_matrix(64, "sylvester").to(wide)).view(x.shape) / 8
    codes, scale = norm_quant(x, [], [], listed(transform), "layer", 1e-6, 64, "sylvester")
    wanted, wanted_scale = norm_module._reference(x, norm, transform)
    errors = [
        (c.double() * s.double()[:, None] - exact).norm() / exact.norm()
        for c, s in ((codes, scale), (wanted, wanted_scale))
    ]
    assert errors[0] < 1.05 * errors[1]


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("act", ACTS)
def test_every_activation_equals_its_reference(act: str) -> None:
    x = torch.randn(9, 2304 if act in GATED else 1152, device="cuda").bfloat16() * 3
    transform = transform_of(1152, 128, "sylvester")
    got = act_quant(x, act, transform.pre_scale, transform.signs, 128, "sylvester")
    assert_agree(got, act_module._reference(x, act, transform), rounding(x.dtype, 128))


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("n", "p"), [(12288, 3072), (1152, 1152), (4608, 384), (1072, 208)])
def test_a_prefix_comes_first_and_as_it_is(n: int, p: int) -> None:
    wide, prefix = (torch.randn(33, width, device="cuda").bfloat16() for width in (n + 512, p + 64))
    x, prefix = wide[:, 512:], prefix[:, :p]
    for act, size in (("gelu_tanh", 0), ("gelu_tanh", 64), ("silu", 0)):
        transform = transform_of(n + p, size, "sylvester")
        got = act_quant(x, act, transform.pre_scale, transform.signs, size, "sylvester", "int8", prefix)
        portable = size and p % size  # blocks that hold columns of both kinds
        assert_agree(
            got, act_module._reference(x, act, transform, prefix), 1e-3 if portable else rounding(x.dtype, size)
        )


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [192, 1152, 3072, 5120])
def test_norm_quant_equals_its_reference(k: int, dtype: torch.dtype) -> None:
    runs = [(1, 1, 0, "layer"), (258, 2, 0, "layer"), (129, 3, 2, "layer"), (34, 17, 1, "rms")]
    for i, (size, kind) in enumerate(rotations_of(k)):
        for m, b, affine, layer in (runs[i], runs[-1 - i]):
            x = (torch.randn(m, 2 * k, device="cuda") * 2 + 0.5).to(dtype)[:, k:]
            mod = list((torch.randn(b, 6 * k, device="cuda") / 2).to(dtype).chunk(6, dim=1)[2:4])
            vectors = [torch.randn(k, device="cuda").to(dtype) for _ in range(affine)]
            norm, transform = Norm(mod, vectors, layer, 1e-6), transform_of(k, size, kind)
            got = norm_quant(x, mod, vectors, listed(transform), layer, 1e-6, size, kind)
            assert_agree(got, norm_module._reference(x, norm, transform), rounding(dtype, size))


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1152, 5120])
def test_gate_norm_quant_equals_its_reference(k: int, dtype: torch.dtype) -> None:
    for m, b, shared in ((256, 2, 2), (129, 3, 3), (12, 4, 6)):
        residual, branch = (torch.randn(m, 2 * k, device="cuda").to(dtype)[:, k:] for _ in range(2))
        gate = torch.randn(b, 3 * k, device="cuda").to(dtype)[:, k : 2 * k]
        mod = list(torch.randn(shared, 2 * k, device="cuda").to(dtype).chunk(2, dim=1))
        transform = transform_of(k, 64, "sylvester")
        for stream in ([residual, branch, gate], [residual, branch]):
            got = gate_norm_quant(stream, mod, [], listed(transform), "layer", 1e-6, 64, "sylvester")
            h = norm_module.gated_residual(stream)
            torch.testing.assert_close(got[0], h, rtol=torch.finfo(dtype).eps, atol=1e-6)
            want = norm_module._reference(got[0], Norm(mod, [], "layer", 1e-6), transform)
            assert_agree(got, want, rounding(dtype, 64))


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no float8 here")
def test_fp8_codes() -> None:
    x = torch.randn(65, 3072, device="cuda").bfloat16()
    for size in (0, 128):
        transform = transform_of(3072, size, "sylvester", torch.float8_e4m3fn)
        got = norm_quant_fp8(x, [], [], listed(transform), "rms", 1e-6, size, "sylvester")
        assert_agree(got, norm_module._reference(x, Norm([], [], "rms", 1e-6), transform), rounding(x.dtype, size))


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no float8 here")
@pytest.mark.parametrize("k", [1152, 3072, 15360])
def test_fp8_codes_of_a_block_equal_their_references_and_do_not_depend_on_the_batch(k: int) -> None:
    x, branch = torch.randn(2, 512, k, device="cuda").bfloat16()
    gate, *mod = torch.randn(2, 6 * k, device="cuda").bfloat16().chunk(6, dim=1)[:3]
    plain = Transform(None, None, 0, "", torch.float8_e4m3fn)
    h, *got = gate_norm_quant_fp8([x, branch, gate], mod, [], [], "layer", 1e-6, 0, "")
    torch.testing.assert_close(h, norm_module.gated_residual([x, branch, gate]), rtol=1e-2, atol=1e-6)
    assert_agree(got, norm_module._reference(h, Norm(mod, [], "layer", 1e-6), plain), 1e-5)
    alone = gate_norm_quant_fp8([x[256:], branch[256:], gate[1:]], [t[1:] for t in mod], [], [], "layer", 1e-6, 0, "")
    acted = act_quant(x, "gelu_tanh", None, None, 0, "", "fp8")
    assert_agree(acted, act_module._reference(x, "gelu_tanh", plain), 1e-5)
    pairs = [*zip(alone, (h, *got), strict=True)]
    pairs += zip(act_quant(x[256:], "gelu_tanh", None, None, 0, "", "fp8"), acted, strict=True)
    assert all(torch.equal(one.float(), among[256:].float()) for one, among in pairs)


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("out", ["fp4", "fp4g16", "fp4g128"])
@pytest.mark.parametrize("k", [1152, 3072, 5120, 15360])
def test_fp4_codes(k: int, out: str) -> None:
    """Without a transform bit for bit `quant_token_fp4`'s; else a few elements may be rounded otherwise."""
    dtype, group = FORMS[out]
    for x in (torch.randn(65, k, device="cuda"), torch.randn(65, k, device="cuda").bfloat16() * 100):
        codes, scale = act_quant(x, "none", None, None, 0, "", out)
        want, want_scale = quant_token_fp4(x, group or 0)
        assert torch.equal(codes, want)
        torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    mod = list(torch.randn(2, 2 * k, device="cuda").chunk(2, dim=1))
    for size in (0, 64):
        transform = replace(transform_of(k, size, "sylvester", dtype), fp4_group=group)
        x = torch.randn(66, k, device="cuda").bfloat16()
        codes, scale = NORM_QUANT[out](x, mod, [], listed(transform), "layer", 1e-6, size, "sylvester")
        want, want_scale = norm_module._reference(x, Norm(mod, [], "layer", 1e-6), transform)
        torch.testing.assert_close(scale, want_scale, rtol=max(1e-3, rounding(x.dtype, size)), atol=0)
        assert (codes != want).float().mean() < (5e-2 if size else 1e-3)


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("k", "size"),
    [
        *((k, size) for k in (1152, 3072, 5120) for size in (0, 64, 128)),
        *((48, 16), (192, 64), (576, 0), (1152, 16), (2240, 64), (4608, 0)),
    ],
)
def test_a_row_does_not_depend_on_its_batch(k: int, size: int) -> None:
    """Nor on how many rows share a modulation, which decides how that is read, nor on how many there are, which decides
    what a warp and a program do."""
    x = torch.randn(1024, k, device="cuda").bfloat16()
    mod, transform = list(torch.randn(2, k, device="cuda")[:, None]), transform_of(k, size, "sylvester")

    def norm(rows: Tensor, shared: int = 1) -> tuple[Tensor, ...]:
        repeated = [t.repeat(shared, 1) for t in mod]
        return norm_quant(rows, repeated, [], listed(transform), "layer", 1e-6, size, "sylvester")

    def act(rows: Tensor) -> tuple[Tensor, ...]:
        return act_quant(rows, "gelu_tanh", transform.pre_scale, transform.signs, size, "sylvester")

    for call in (norm, act, lambda rows: norm(rows, len(rows))):
        whole = call(x)
        for start, stop in ((0, 1), (5, 6), (3, 20), (1, 1024), (1023, 1024)):
            for got, want in zip(call(x[start:stop]), whole, strict=True):
                assert torch.equal(got, want[start:stop])
    for shared in (4, 1024):
        for got, want in zip(norm(x, shared), norm(x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("dtype", "out"), [(torch.bfloat16, "fp4g16"), (torch.float16, "int8"), (torch.float32, "int8")]
)
def test_a_gated_row_of_any_kind_does_not_depend_on_its_batch(dtype: torch.dtype, out: str) -> None:
    x, branch = torch.randn(2, 1024, 1152, device="cuda").to(dtype)
    gate, *mod = torch.randn(3, 1, 1152, device="cuda").to(dtype)
    transform = listed(transform_of(1152, 64, "sylvester"))

    def run(start: int, stop: int) -> tuple[Tensor, ...]:
        rows = [x[start:stop], branch[start:stop], gate]
        if out == "int8":
            return gate_norm_quant(rows, mod, [], transform, "layer", 1e-6, 64, "sylvester")
        return NORM_QUANT[out](rows[0], mod, [], transform, "layer", 1e-6, 64, "sylvester")

    whole = run(0, 1024)
    for start, stop in ((0, 1), (5, 6), (3, 20), (1, 1024), (1023, 1024)):
        for got, want in zip(run(start, stop), whole, strict=True):
            assert torch.equal(got, want[start:stop])


@pytest.mark.gpus(1)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("size", [0, 64])
def test_rows_that_are_not_finite_or_zero(size: int) -> None:
    x = torch.randn(6, 1152, device="cuda").bfloat16()
    x[1, 2], x[2, 5], x[3, 1151], x[4] = float("nan"), float("inf"), -float("inf"), 0
    codes, scale = act_quant(x, "none", None, None, size, "sylvester")
    assert torch.isfinite(scale).tolist() == [True, False, False, False, True, True]
    assert scale[4] > 0
    assert codes[4].abs().max() == 0
    assert act_quant(x[:0], "none", None, None, size, "sylvester")[0].shape == (0, 1152)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
