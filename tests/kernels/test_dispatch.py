import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cases import _case
from vdit_quant.kernels import attention, dispatch, scaled_mm, sdpa
from vdit_quant.kernels.dispatch import Choice, KernelUnavailable, Settings

X = torch.ones(2, 2)


class triton_like_error(Exception):
    __module__ = "triton.runtime.errors"


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """Process-wide state of its own for every test."""
    monkeypatch.setattr(dispatch, "_process", dispatch._Process(Settings()))


@pytest.fixture
def accelerator(monkeypatch):
    """Pretend that CPU tensors are on a GPU and that the Triton twin of every op is this object."""
    twin = SimpleNamespace(
        limits=lambda op, **facts: "too small" if facts.get("k") == 1 else None,
        supports=lambda op, *args: None,
        run=lambda op, *args: "triton",
    )
    monkeypatch.setattr(dispatch, "_device_reason", lambda device: None)
    monkeypatch.setattr(dispatch, "_twin", lambda op: twin)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return twin


def reference(*args: object) -> str:
    return "reference"


def test_auto_runs_triton_when_it_can(accelerator) -> None:
    assert dispatch.run("quant_token", reference, X) == "triton"
    assert dispatch.fallbacks() == {}


def test_a_fallback_is_kept_and_logged_once(accelerator, caplog) -> None:
    accelerator.supports = lambda op, *args: "the moon is full"
    with caplog.at_level(logging.WARNING, logger="vdit_quant"):
        for _ in range(3):
            assert dispatch.run("quant_token", reference, X) == "reference"
    assert dispatch.fallbacks() == {"quant_token": {"the moon is full"}}
    assert [record.getMessage() for record in caplog.records] == [
        "quant_token runs its torch reference on cpu: the moon is full"
    ]


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_in_the_place_of_a_kernel_a_reference_runs_without_autocast(accelerator, mode: str) -> None:
    accelerator.supports = lambda op, *args: "the moon is full"
    with dispatch.use(mode=mode), torch.autocast("cpu", torch.bfloat16):
        assert dispatch.run("quant_token", lambda x: (x @ x).dtype, torch.ones(2, 2)) == torch.float32
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("settings", [{"strict": True}, {"mode": "triton"}])
def test_refusing_a_fallback_names_op_and_reason(accelerator, settings) -> None:
    accelerator.supports = lambda op, *args: "the moon is full"
    with dispatch.use(**settings), pytest.raises(KernelUnavailable, match=r"quant_token.*the moon is full"):
        dispatch.run("quant_token", reference, X)
    assert dispatch.fallbacks() == {}


def test_reference_mode_is_not_a_fallback_but_strict_refuses_it(accelerator) -> None:
    with dispatch.use(mode="reference"):
        assert dispatch.run("quant_token", reference, X) == "reference"
        assert dispatch.fallbacks() == {}
        with dispatch.use(strict=True), pytest.raises(KernelUnavailable, match="the mode is 'reference'"):
            dispatch.run("quant_token", reference, X)


def test_a_kernel_that_does_not_launch_is_tried_once(accelerator) -> None:
    calls = []

    def fail(op: str, *args: object) -> None:
        calls.append(op)
        raise triton_like_error("out of resource: shared memory")

    accelerator.run = fail
    for _ in range(2):
        assert dispatch.run("quant_token", reference, X) == "reference"
    assert calls == ["quant_token"]
    assert dispatch.fallbacks() == {"quant_token": {"triton_like_error: out of resource: shared memory"}}


def test_other_errors_are_not_hidden(accelerator) -> None:
    def fail(op: str, *args: object) -> None:
        raise ZeroDivisionError

    accelerator.run = fail
    with pytest.raises(ZeroDivisionError):
        dispatch.run("quant_token", reference, X)


def test_explain_answers_without_running(accelerator) -> None:
    assert dispatch.explain("int8_linear", "cuda", k=128) == Choice("int8_linear", "triton", "supported")
    assert dispatch.explain("int8_linear", "cuda", k=1) == Choice("int8_linear", "reference", "too small")
    with dispatch.use(mode="reference"):
        assert dispatch.explain("int8_linear", "cuda") == Choice("int8_linear", "reference", "the mode is 'reference'")
    with pytest.raises(ValueError, match=f"unknown op 'int3_linear'; the ops are {min(dispatch.TWINS)}"):
        dispatch.explain("int3_linear", "cuda")


@pytest.fixture
def library(accelerator, monkeypatch):
    """Pretend that a vendor's library has `fp8_linear`."""
    module = SimpleNamespace(
        limits=lambda op, device, **facts: "odd" if facts.get("n") == 1 else None,
        supports=lambda op, *args: None,
        run=lambda op, *args: "library",
    )
    monkeypatch.setattr(dispatch, "_library", lambda op: ("vendor", module) if op == "fp8_linear" else None)
    return module


def test_a_library_comes_before_triton(library) -> None:
    with dispatch.use(strict=True):
        assert dispatch.run("fp8_linear", reference, X) == "library"
        assert dispatch.run("quant_token", reference, X) == "triton"
    assert dispatch.explain("fp8_linear", "cuda", n=16) == Choice("fp8_linear", "vendor", "supported")
    assert dispatch.explain("fp8_linear", "cuda", n=1) == Choice("fp8_linear", "triton", "supported")
    library.supports = lambda op, *args: "odd"
    assert dispatch.run("fp8_linear", reference, X) == "triton"
    with dispatch.use(mode="reference"):
        assert dispatch.run("fp8_linear", reference, X) == "reference"


def test_a_library_takes_the_place_of_a_kernel_that_does_not_launch(library, accelerator, caplog) -> None:
    def fail(op: str, *args: object) -> None:
        raise triton_like_error("no such layout")

    accelerator.run = fail
    library.supports = lambda op, x: None if dispatch.blocker(op, x.device) else "slower"
    with dispatch.use(strict=True):
        for _ in range(2):
            assert dispatch.run("fp8_linear", reference, X) == "library"
    assert dispatch.fallbacks() == {"fp8_linear": {"triton_like_error: no such layout"}}
    assert len(caplog.records) == 1


def test_attention_on_hopper_is_torchs_where_its_kernel_does_not_import(accelerator, monkeypatch, caplog) -> None:
    reason = "the Triton kernel does not import: ImportError: gdc_wait"
    monkeypatch.setattr(dispatch, "_twin", lambda op: reason)
    monkeypatch.setattr(sdpa, "_is_hopper", lambda device: True)
    q = torch.randn(1, 8, 2, 16).bfloat16()
    with dispatch.use(strict=True):
        for _ in range(2):
            out = dispatch.run("attention", reference, q, q, q, None)
    torch.testing.assert_close(out, attention.attend(q, q, q, None))
    assert dispatch.fallbacks() == {"attention": {reason}}
    assert [record.getMessage() for record in caplog.records] == [
        f"attention runs without its Triton kernel on cpu: {reason}"
    ]


def test_libraries_are_for_the_mode_auto_only() -> None:
    assert dispatch._library("fp8_linear")[0] == "cublaslt"
    assert dispatch._library("int8_linear") is None
    for mode in ("triton", "reference"):
        with dispatch.use(mode=mode):
            assert dispatch._library("fp8_linear") is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"k": 1160}, "K=1160 is not a multiple of 16"),
        ({"n": 40}, "N=40 is not a multiple of 16"),
        ({"out_dtype": torch.float32}, "the output is torch.float32, not bfloat16"),
    ],
)
def test_what_cublaslt_refuses(facts, reason) -> None:
    assert scaled_mm.limits("fp8_linear", torch.device("cuda"), **facts) == reason


@pytest.mark.parametrize("op", sorted(dispatch.TWINS))
def test_explain_on_cpu(op: str) -> None:
    assert dispatch.explain(op, "cpu") == Choice(op, "reference", "CPU tensor: the torch reference runs")
    assert dispatch.explain(op, "mps").reason == "device type 'mps' has no Triton kernels here"


@pytest.mark.parametrize(
    ("op", "facts", "reason"),
    [limit for name in _case.names() for limit in getattr(_case.load(name), "LIMITS", ())],
)
def test_explain_knows_the_limits_of_the_real_kernels(op: str, facts, reason, monkeypatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(dispatch, "_device_reason", lambda device: None)
    monkeypatch.setattr(dispatch, "LIBRARIES", {})
    choice = dispatch.explain(op, "cuda", **facts)
    assert (choice.backend, choice.reason) == (("triton", "supported") if reason is None else ("reference", reason))


def test_old_gpus_and_missing_gpus_have_a_reason(monkeypatch) -> None:
    ask = dispatch._device_reason.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ask(torch.device("cuda")) == "no GPU is visible to torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert ask(torch.device("cuda")) == "compute capability < 8.0"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert ask(torch.device("cuda")) is None


def test_a_twin_that_does_not_import_is_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.6.0")
    monkeypatch.setitem(sys.modules, "vdit_quant.kernels._triton.quant_token", None)
    reason = dispatch._twin.__wrapped__("quant_token")
    assert reason.startswith("the Triton kernel does not import: ModuleNotFoundError")


def test_settings_nest_and_are_checked() -> None:
    assert dispatch.configure(mode="reference") == Settings("reference", False)
    with dispatch.use(strict=True) as inner:
        assert inner == dispatch.settings() == Settings("reference", True)
        with dispatch.use(mode="auto"):
            assert dispatch.settings() == Settings("auto", True)
    assert dispatch.settings() == Settings("reference", False)
    with pytest.raises(ValueError, match=r"kernel mode .* must be one of auto, triton, reference, found 'fast'"):
        dispatch.configure(mode="fast")


def test_settings_come_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("VDIT_KERNELS", "Reference")
    monkeypatch.setenv("VDIT_STRICT", "1")
    assert dispatch._from_environment() == Settings("reference", True)
    monkeypatch.setenv("VDIT_KERNELS", "")
    monkeypatch.setenv("VDIT_STRICT", "0")
    assert dispatch._from_environment() == Settings("auto", False)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from vdit_quant.kernels import dispatch, int8_linear, quant_token
codes, scale = quant_token.quant_token(torch.randn(3, 32))
y = int8_linear.int8_linear(codes, scale, codes, scale, None, torch.float32)
assert y.shape == (3, 3)
assert dispatch.triton_version() is None
assert dispatch.available().reason == "triton is not installed"
dispatch._device_reason = lambda device: None
assert dispatch.explain("int8_linear", "cuda").reason == "triton is not installed"
"""

WITHOUT_RUNNING = """
import importlib, pkgutil, sys
import vdit_quant.kernels
for module in pkgutil.iter_modules(vdit_quant.kernels.__path__):
    importlib.import_module(f"vdit_quant.kernels.{module.name}")
assert "vdit_quant.kernels.norm_quant" in sys.modules
assert not [name for name in sys.modules if name.startswith("vdit_quant.kernels._triton")]
assert "diffusers" not in sys.modules and "scipy" not in sys.modules
"""


@pytest.mark.parametrize("program", [WITHOUT_TRITON, WITHOUT_RUNNING])
def test_import_needs_neither_triton_nor_gpu(program: str, child_environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
