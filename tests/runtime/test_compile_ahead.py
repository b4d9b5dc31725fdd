"""Kernels compiled side by side: every different launch once, and nothing of it in the result."""

import os
import threading
import time

import pytest
import torch
from torch import Tensor

from vdit_quant.kernels import dispatch
from vdit_quant.kernels.int8_linear import int8_linear
from vdit_quant.kernels.op import FAKES
from vdit_quant.kernels.quant_token import quant_token
from vdit_quant.runtime import compile_ahead as module
from vdit_quant.runtime.compile_ahead import compile_ahead

WEIGHT = torch.ones(16, 32, dtype=torch.int8)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CPU tensors had kernels."""
    monkeypatch.setattr(dispatch, "available", lambda: dispatch.Choice("*", "triton", "a test"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Op, thread and kernel mode of every launch."""
    found: list[tuple[str, str, str]] = []
    launch = module._Ahead._launch

    def record(self: module._Ahead, func: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        found.append((str(func), threading.current_thread().name, dispatch.settings().mode))
        launch(self, func, args, kwargs)

    monkeypatch.setattr(module._Ahead, "_launch", record)
    return found


def layer(x: Tensor) -> Tensor:
    codes, scale = quant_token(x)
    return int8_linear(codes, scale, WEIGHT, torch.ones(16), None, torch.float32)


def test_each_different_launch_happens_once_elsewhere_with_the_settings_of_the_caller(
    everywhere: None, launched: list[tuple[str, str, str]]
) -> None:
    shapes = []

    def call() -> None:
        for rows in (4, 4, 6):
            shapes.append(layer(torch.randn(rows, 32)).shape)

    with dispatch.use(mode="reference"):
        assert compile_ahead(call) == 4
    assert shapes == [(4, 16), (4, 16), (6, 16)]
    assert sorted(name for name, _, _ in launched) == 2 * ["vdit_quant.int8_linear.default"] + 2 * [
        "vdit_quant.quant_token.default"
    ]
    assert threading.current_thread().name not in {thread for _, thread, _ in launched}
    assert len({(name, thread) for name, thread, _ in launched}) == 2  # any number of tokens is one kernel
    assert {mode for _, _, mode in launched} == {"reference"}


def test_kernels_of_one_op_are_compiled_side_by_side(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(module._Ahead, "_launch", lambda *_: together.wait())
    assert compile_ahead(lambda: [quant_token(torch.randn(4, k)) for k in (16, 32)]) == 2
    assert not together.broken


def test_no_more_kernels_are_compiled_at_once_than_there_are_processors(
    everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = [], []

    def slow(x: Tensor) -> tuple[Tensor, Tensor]:
        running.append(x)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return x.to(torch.int8), x[:, 0]

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    note = module._Ahead.note
    monkeypatch.setattr(module._Ahead, "note", lambda self, func, args, kwargs: note(self, slow, args, kwargs))
    assert compile_ahead(lambda: [quant_token(torch.randn(4, k)) for k in range(16, 24)]) == 8
    assert max(most) == 2


def test_the_call_itself_is_as_before(everywhere: None) -> None:
    x = torch.randn(4, 32)
    before = layer(x)
    compile_ahead(lambda: layer(x))
    assert torch.equal(layer(x), before)


def test_a_compiled_part_of_the_call_is_compiled_by_the_call_itself(everywhere: None) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    part, x = torch.compile(lambda x: x.sin() + 1, backend=backend), torch.randn(4, 32)
    assert compile_ahead(lambda: layer(part(x))) == 2
    assert not graphs
    assert torch.equal(part(x), x.sin() + 1)
    assert len(graphs) == 1


def test_an_error_of_a_launch_is_left_for_the_call(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("does not compile")

    monkeypatch.setattr(module._Ahead, "_launch", fail)
    assert compile_ahead(lambda: layer(torch.randn(4, 32))) == 2


def test_an_error_of_the_call_is_raised_but_for_want_of_memory(everywhere: None) -> None:
    def fail(error: Exception) -> None:
        layer(torch.randn(4, 32))
        raise error

    with pytest.raises(ValueError, match="a wrong call"):
        compile_ahead(lambda: fail(ValueError("a wrong call")))
    assert compile_ahead(lambda: fail(torch.OutOfMemoryError("full"))) == 2


def test_without_kernels_the_call_is_not_even_run() -> None:
    with dispatch.use(mode="reference"):
        assert compile_ahead(lambda: pytest.fail("was run")) == 0


def test_every_op_can_be_answered_without_running_it() -> None:
    ops = {name for name in dir(torch.ops.vdit_quant) if not name.startswith("_") and name != "name"}
    assert {func._schema.name.split("::")[1] for func in FAKES} >= ops


@pytest.mark.gpus(1)
@torch.no_grad()
def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.randn(256, 480, device="cuda", dtype=torch.bfloat16)
    weight, scale = torch.ones(320, 480, dtype=torch.int8, device="cuda"), torch.ones(320, device="cuda")

    def call() -> Tensor:
        return int8_linear(*quant_token(x), weight, scale, None, torch.bfloat16)

    assert compile_ahead(call) == 2
    torch.cuda.synchronize()
    compiled = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **found: compiled.append(found))
    out = call()
    assert not compiled
    with dispatch.use(mode="reference"):
        assert torch.equal(out, call())
