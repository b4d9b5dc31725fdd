"""The Hopper kernel of the int8 products: on a Hopper GPU equal to the reference bit by bit, elsewhere not used."""

from typing import Any

import pytest
import torch

from vdit_quant.kernels import dispatch, launch_table
from vdit_quant.kernels import int8_linear as int8_module
from vdit_quant.kernels import int8_linear_add as add_module
from vdit_quant.kernels import int8_linear_low_rank as low_rank_module
from vdit_quant.kernels.int8_linear import int8_linear
from vdit_quant.kernels.int8_linear_add import int8_linear_add
from vdit_quant.kernels.int8_linear_low_rank import int8_linear_low_rank

hopper = pytest.importorskip("vdit_quant.kernels._triton.hopper", reason="triton is not installed")

DEVICE = torch.device("cuda", 0)
BLOCKER = hopper.KERNELS.reason(DEVICE)
on_hopper = pytest.mark.skipif(BLOCKER is not None, reason=str(BLOCKER))

SHAPES = [(1, 1152, 1152), (17, 1152, 1152), (1000, 1096, 1152), (4429, 1096, 1040), (8191, 1152, 4608)]
PORTABLE = {"BM": 128, "BN": 128, "BK": 128, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}
HALVES = [torch.bfloat16, torch.float16]


def name(options: hopper.Options) -> str:
    return f"{options['NC'] * options['CM']}x{options['BN']}x{options['BK']}-{options['STAGES']}"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `hopper.launch` answered, call by call; a fallback to the reference is an error."""
    answers: list[bool] = []
    launch = hopper.launch

    def record(*args) -> bool:
        answers.append(launch(*args))
        return answers[-1]

    monkeypatch.setattr(hopper, "launch", record)
    with dispatch.use(mode="auto", strict=True):
        yield answers


@on_hopper
@pytest.mark.parametrize("options", hopper.STORED, ids=name)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8_linear(m: int, n: int, k: int, options: hopper.Options, make_layer, ran: list[bool]) -> None:
    a = make_layer(m, k, n, device="cuda")
    for dtype in HALVES:
        for bias in (a.bias, None):
            args = (a.codes, a.scale, a.weight, a.weight_scale, bias, dtype)
            with launch_table.forced("int8_linear", options):
                got = int8_linear(*args)
            assert torch.equal(got, int8_module._reference(*args))
    assert all(ran)


@on_hopper
@pytest.mark.parametrize("options", hopper.ADDED, ids=name)
@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (3, 43), (2, 256), (4, 1000), (1, 4429)])
def test_int8_linear_add(samples: int, tokens: int, options: hopper.Options, make_layer, ran: list[bool]) -> None:
    for n, k in ((1152, 1152), (1096, 1040)):
        a = make_layer(samples * tokens, k, n, device="cuda")
        residual = torch.randn(samples * tokens, n, device="cuda")
        gate = torch.randn(samples, 6 * n, device="cuda")
        for dtype in HALVES:
            gates = gate.to(dtype)[:, 2 * n : 3 * n]
            for chosen, bias in ((gates, a.bias), (gates, None), (None, a.bias)):
                args = (a.codes, a.scale, a.weight, a.weight_scale, bias, residual.to(dtype), chosen)
                with launch_table.forced("int8_linear_add", options):
                    got = int8_linear_add(*args)
                assert torch.equal(got, add_module._reference(*args))
    assert all(ran)


@on_hopper
@pytest.mark.parametrize("options", hopper.STORED, ids=name)
@pytest.mark.parametrize("rank", [8, 32, 64, 72, 128])
def test_low_rank(rank: int, options: hopper.Options, make_layer, ran: list[bool]) -> None:
    """One layer, and three joined ones, by every tile: the bits of the portable kernel, which the reference is close
    to."""
    for m, n, k in ((17, 1096, 1152), (1000, 2304, 1040), (4429, 2304, 4608)):
        for dtype in HALVES:
            a = make_layer(m, k, n, dtype=dtype, device="cuda")
            low, up = (torch.randn(rows, rank * layers, device="cuda").to(dtype) for rows, layers in ((m, 3), (n, 1)))
            owner = torch.arange(3, dtype=torch.uint8, device="cuda")
            for branch in ([low[:, rank : 2 * rank], up], *([[low, up, owner]] if n == 2304 else [])):
                args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, branch, [], dtype)
                got = low_rank_on_hopper("int8_linear", options, args)
                with launch_table.forced("int8_linear", PORTABLE):
                    assert torch.equal(got, int8_linear_low_rank(*args))
                assert relative(got, low_rank_module._reference(*args)) < torch.finfo(dtype).eps
    assert ran == [True, False] * (len(ran) // 2)


@on_hopper
@pytest.mark.parametrize("options", hopper.ADDED, ids=name)
@pytest.mark.parametrize(("samples", "tokens"), [(3, 43), (2, 256), (1, 4429)])
def test_low_rank_add(samples: int, tokens: int, options: hopper.Options, make_layer, ran: list[bool]) -> None:
    for n, k, rank in ((1152, 1152, 32), (1096, 1040, 96)):
        a = make_layer(samples * tokens, k, n, dtype=torch.bfloat16, device="cuda")
        low, up = (torch.randn(rows, rank, device="cuda").bfloat16() for rows in (samples * tokens, n))
        residual, gate = torch.randn(samples * tokens, n, device="cuda").bfloat16(), make_layer(samples, 2 * n, 1).x
        for stream in ([residual], [residual, gate.cuda().bfloat16()[:, n:]]):
            args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, [low, up], stream, torch.bfloat16)
            got = low_rank_on_hopper("int8_linear_add", options, args)
            with launch_table.forced("int8_linear_add", PORTABLE):
                assert torch.equal(got, int8_linear_low_rank(*args))
            assert relative(got, low_rank_module._reference(*args)) < torch.finfo(torch.bfloat16).eps
    assert ran == [True, False] * (len(ran) // 2)


def low_rank_on_hopper(op: str, options: hopper.Options, args: tuple[Any, ...]) -> torch.Tensor:
    with launch_table.forced(op, options):
        return int8_linear_low_rank(*args)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@on_hopper
def test_a_row_has_the_same_bits_in_every_kernel(make_layer, ran: list[bool]) -> None:
    a = make_layer(8192, 1152, 3456, device="cuda")
    rest = (a.weight, a.weight_scale, a.bias, torch.bfloat16)
    whole = int8_linear(a.codes, a.scale, *rest)
    for rows in (1, 16, 64, 512):
        assert torch.equal(int8_linear(a.codes[:rows], a.scale[:rows], *rest), whole[:rows])
    assert ran[0]
    assert not ran[1]


@on_hopper
@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(1100, 1152, torch.bfloat16), (3456, 1160, torch.bfloat16), (3456, 1152, torch.float32)]
)
def test_what_it_cannot_take_runs_the_portable_kernel(n: int, k: int, dtype: torch.dtype, make_layer, ran) -> None:
    a = make_layer(4096, k, n, device="cuda")
    args = (a.codes, a.scale, a.weight, a.weight_scale, a.bias, dtype)
    assert torch.equal(int8_linear(*args), int8_module._reference(*args))
    assert ran == [False]


def test_no_other_device_runs_it() -> None:
    assert hopper.KERNELS.reason(torch.device("cpu")) == "not an NVIDIA GPU"
    tensors = (torch.zeros(8192, 128, dtype=torch.int8), None, None, None, None)
    assert not hopper.launch("int8_linear", tensors, torch.zeros(8192, 3456, dtype=torch.bfloat16), hopper.STORED[0])


@pytest.mark.parametrize("op", ["int8_linear", "int8_linear_add"])
def test_few_tokens_stay_with_the_portable_kernel(op: str) -> None:
    assert hopper.heuristic(op, 64, 12288, 3072) is None
    assert hopper.heuristic(op, 512, 1152, 1152) is None
    assert hopper.heuristic(op, 8192, 1152, 1152)["variant"] == "hopper"


def test_a_tile_is_part_of_one_layer() -> None:
    sizes = {hopper.heuristic("int8_linear", 8192, 3456, 1152, unit)["BN"] for unit in (1152, 2304, 1728)}
    assert 256 not in sizes
    assert hopper.heuristic("int8_linear", 8192, 3 * 96, 1152, 96) is None
    assert hopper.Ending(owner=torch.zeros(3)).unit(3456) == 1152


def test_the_estimate_counts_waves() -> None:
    wide, low = hopper.tile(2, 128, 128, 4, 1), hopper.tile(3, 64, 128, 4, 2)
    # 288 tiles of 256 x 128 take three waves as 387 of 192 x 128 do; for many waves the larger tile loads less.
    assert hopper.cost(low, 8192, 1152, 1152) < hopper.cost(wide, 8192, 1152, 1152)
    assert hopper.cost(wide, 65536, 12288, 3072) < hopper.cost(low, 65536, 12288, 3072)
