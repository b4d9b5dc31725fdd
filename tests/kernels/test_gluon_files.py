"""Files in Gluon that cannot be imported, or whose kernels do not launch: said once, then Triton without asking."""

import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vdit_quant.kernels import dispatch, launch_table
from vdit_quant.kernels.norm_quant import Norm
from vdit_quant.kernels.transform import Transform

pytest.importorskip("triton", reason="triton is not installed")
from vdit_quant.kernels._triton import act_quant, attention, gluon_files, hopper, int8_linear, norm_quant, rows
from vdit_quant.kernels._triton.gluon_files import GluonFile

GPU, OTHER_GPU, CPU = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
PACKAGE = "vdit_quant.kernels._triton"


class triton_like_error(Exception):
    __module__ = "triton.compiler.errors"


class Portable:
    """A portable Triton kernel that counts its launches."""

    launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        self.launches += 1


class Broken:
    """A file in Gluon that takes everything and whose launches raise an error."""

    def __init__(self, error: Exception) -> None:
        self.error, self.launches = error, 0
        self.limits = self.refusal = lambda *args: None

    def launch(self, *args: Any) -> None:
        self.launches += 1
        raise self.error

    run_act = run_norm = launch


@pytest.fixture
def hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there are GPUs, all Hopper, and that Triton compiles for them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(gluon_files, "INTERPRETED", False)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="vdit_quant")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process-wide state of its own for every test."""
    monkeypatch.setattr(dispatch, "_process", dispatch._Process(dispatch.Settings()))


PLAIN = Transform(None, None, 0, "", torch.int8)


def _attention() -> None:
    q, k, v = torch.zeros(3, 1, attention.MANY, 1, 64, dtype=torch.bfloat16).unbind(0)
    attention.run("attention", q[:, :3], k, v, None)


def _act_quant() -> None:
    act_quant.run("act_quant", torch.zeros(3, 64), "none", PLAIN)


def _norm_quant() -> None:
    norm_quant.run("norm_quant", torch.zeros(3, 64), Norm([], [], "layer", 1e-6), PLAIN)


def _int8_linear() -> None:
    codes, weight = (torch.zeros(n, 16, dtype=torch.int8) for n in (2048, 2048))
    int8_linear.run("int8_linear", codes, torch.ones(2048), weight, torch.ones(2048), None, torch.bfloat16)


CALLS = {
    "attention": (_attention, attention.HOPPER, "attention runs without the Hopper kernel on cpu"),
    "act_quant": (_act_quant, rows.GLUON, "the portable Triton producers run on cpu"),
    "norm_quant": (_norm_quant, rows.GLUON, "the portable Triton producers run on cpu"),
    "int8_linear": (_int8_linear, hopper.KERNELS, "int8 products run the portable Triton kernel on cpu"),
}
"""File of a twin -> a call that prefers Gluon, the file in Gluon, what is logged when that is left."""


@pytest.fixture(params=CALLS)
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One of `CALLS`, with what it launches replaced; `offer` puts a file in Gluon in place."""
    call, file, message = CALLS[request.param]
    portable = Portable()
    monkeypatch.setattr(f"{PACKAGE}.{request.param}.{request.param}_kernel", portable)
    return SimpleNamespace(
        call=call,
        file=file,
        message=message,
        portable=portable,
        offer=lambda module: monkeypatch.setattr(file, "_found", {CPU: module}),
    )


def test_a_launch_that_fails_is_reported_once_and_not_tried_again(twin, messages) -> None:
    broken = Broken(triton_like_error("no such layout"))
    twin.offer(broken)
    for _ in range(3):
        twin.call()
    assert (broken.launches, twin.portable.launches) == (1, 3)
    assert messages() == [f"{twin.message}: triton_like_error: no such layout"]
    assert twin.file.reason(CPU) == "triton_like_error: no such layout"
    assert dispatch.fallbacks() == {twin.file.name: {"cpu: triton_like_error: no such layout"}}


def test_errors_that_are_not_tritons_are_not_hidden(twin, messages) -> None:
    broken = Broken(ZeroDivisionError("a bug"))
    twin.offer(broken)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="a bug"):
            twin.call()
    assert (broken.launches, twin.portable.launches) == (2, 0)
    assert messages() == []


def test_a_candidate_that_fails_while_tuning_leaves_the_file_in_use(monkeypatch, messages) -> None:
    monkeypatch.setattr(hopper.KERNELS, "_found", {CPU: Broken(triton_like_error("no such layout"))})
    with launch_table.forced("int8_linear", hopper.STORED[0]), pytest.raises(triton_like_error):
        _int8_linear()
    assert hopper.KERNELS.reason(CPU) is None
    assert messages() == []


@pytest.mark.usefixtures("hopper_gpu")
@pytest.mark.parametrize("file", [attention.HOPPER, rows.GLUON, hopper.KERNELS], ids=lambda file: file.name)
def test_an_import_that_fails_is_reported_once_a_device(file: GluonFile, monkeypatch, messages) -> None:
    monkeypatch.setattr(file, "_found", {})
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.{file.name}", None)
    for device in (GPU, GPU, OTHER_GPU, GPU):
        assert file.on(device) is None
    assert file.reason(GPU).startswith(f"this Triton has no Gluon as {file.name}.py needs it: ModuleNotFoundError: ")
    assert messages() == [f"{file.instead} on {device}: {file.reason(device)}" for device in (GPU, OTHER_GPU)]
    assert file.note(GPU) == f"{file.instead}: {file.reason(GPU)}"
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.{file.name}", SimpleNamespace())
    assert file.on(GPU) is None


@pytest.mark.usefixtures("hopper_gpu")
def test_a_failure_on_one_device_is_none_on_another(monkeypatch, messages) -> None:
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.attention_hopper", module)
    file = GluonFile("attention_hopper", "Triton runs", hopper=True)
    assert file.on(GPU) is file.on(OTHER_GPU) is module
    for _ in range(2):  # as two threads would
        file.leave(GPU, triton_like_error("too large"))
    assert (file.on(GPU), file.on(OTHER_GPU)) == (None, module)
    assert messages() == ["Triton runs on cuda:0: triton_like_error: too large"]
    assert (file.note(GPU), file.note(OTHER_GPU)) == ("Triton runs: triton_like_error: too large", None)


@pytest.mark.usefixtures("hopper_gpu")
@pytest.mark.parametrize(
    "op", ["int8_linear", "int8_linear_add", "int4_linear", "norm_quant", "act_quant", "attention"]
)
def test_what_runs_in_its_place_is_told_and_no_error(op: str, monkeypatch) -> None:
    for file in (attention.HOPPER, rows.GLUON, hopper.KERNELS):
        monkeypatch.setattr(file, "_found", {GPU: "no such layout"})
    monkeypatch.setattr(dispatch, "_device_reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with dispatch.use(mode="triton", strict=True):
        choice = dispatch.explain(op, "cuda")
    assert choice.backend == "triton"
    assert choice.note is not None
    assert choice.note.endswith(": no such layout")
    assert dispatch.explain(op, "cuda").note == choice.note


@pytest.mark.usefixtures("hopper_gpu")
@pytest.mark.parametrize(
    ("name", "value", "reason", "anywhere"),
    [
        ("torch.cuda.is_available", lambda: False, "not an NVIDIA GPU", False),
        ("torch.version.hip", "7.0", "not an NVIDIA GPU", False),
        ("torch.cuda.get_device_capability", lambda device: (8, 0), "not a Hopper GPU", True),
        ("torch.cuda.get_device_capability", lambda device: (10, 0), "not a Hopper GPU", True),
        (f"{PACKAGE}.gluon_files.INTERPRETED", True, "Triton's interpreter does not know Gluon", False),
    ],
)
def test_where_no_file_is_meant_to_run_nothing_is_imported_or_said(
    name: str, value: Any, reason: str, anywhere: bool, monkeypatch, messages
) -> None:
    monkeypatch.setattr(name, value)
    file = GluonFile("there_is_no_such_file", "Triton runs", hopper=True)
    assert (file.reason(GPU), file.note(GPU)) == (reason, None)
    assert GluonFile("there_is_no_such_file", "Triton runs").reason(CPU) == "not an NVIDIA GPU"
    assert messages() == []
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.gluon_producers", SimpleNamespace())
    assert (GluonFile("gluon_producers", "Triton runs").on(GPU) is not None) == anywhere
