"""The Hopper kernel of the int8 products: on a Hopper GPU equal to the reference bit by bit, elsewhere not used."""

import pytest
import torch

from vdit_quant.kernels import dispatch, launch_table
from vdit_quant.kernels import int8_linear as int8_module
from vdit_quant.kernels import int8_linear_add as add_module
from vdit_quant.kernels.int8_linear import int8_linear
from vdit_quant.kernels.int8_linear_add import int8_linear_add

hopper = pytest.importorskip("vdit_quant.kernels._triton.hopper", reason="triton is not installed")

DEVICE = torch.device("cuda", 0)
BLOCKER = hopper.KERNELS.reason(DEVICE)
on_hopper = pytest.mark.skipif(BLOCKER is not None, reason=str(BLOCKER))

SHAPES = [(1, 1152, 1152), (17, 1152, 1152), (1000, 1096, 1152), (4429, 1096, 1040), (8191, 1152, 4608)]
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


def test_the_estimate_counts_waves() -> None:
    wide, low = hopper.tile(2, 128, 128, 4, 1), hopper.tile(3, 64, 128, 4, 2)
    # 288 tiles of 256 x 128 take three waves as 387 of 192 x 128 do; for many waves the larger tile loads less.
    assert hopper.cost(low, 8192, 1152, 1152) < hopper.cost(wide, 8192, 1152, 1152)
    assert hopper.cost(wide, 65536, 12288, 3072) < hopper.cost(low, 65536, 12288, 3072)
