"""CUDA-graph replay: the same numbers, one capture a shape, and never a stale one."""

import copy
import gc
import inspect
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdit_quant.runtime import graphs
from vdit_quant.runtime.graphs import GraphedForward, replay_graphs


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor, scale: float = 1.0, extra: object = None) -> tuple[Tensor, ...]:
        return (self.layer(x) * scale + timestep,)


def graphed(model: nn.Module) -> GraphedForward:
    return model.forward.__self__  # type: ignore[attr-defined, return-value]


@torch.no_grad()
def test_on_a_cpu_the_model_runs_as_it_is() -> None:
    model = Denoiser()
    x, t = torch.randn(2, 8), torch.tensor([1.0])
    expected = model(x, t)[0]
    replay_graphs(model)
    assert torch.equal(model(x, t)[0], expected)
    assert graphed(model).captures == 0


def test_a_pipeline_sees_which_arguments_the_model_takes() -> None:
    model = Denoiser()
    before = inspect.signature(model.forward)
    replay_graphs(model)
    assert inspect.signature(model.forward) == before
    copied = copy.deepcopy(model)
    assert inspect.signature(copied.forward) == before
    assert graphed(copied).model is copied
    assert graphed(copied).own.__self__ is copied  # type: ignore[attr-defined]


def test_the_switch_leaves_nothing_behind() -> None:
    model = Denoiser()
    before = dict(model.__dict__)
    replay_graphs(replay_graphs(model))
    assert replay_graphs(model, enabled=False).__dict__.keys() == before.keys()
    assert replay_graphs(model, enabled=False).__dict__.keys() == before.keys()


@torch.no_grad()
def test_a_model_that_cannot_be_captured_runs_as_it_is_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = Denoiser()
    x, t = torch.randn(2, 8), torch.tensor([1.0])
    expected = model(x, t)[0]
    replay_graphs(model)
    monkeypatch.setattr(graphs, "capture_key", lambda *_: "a call")
    monkeypatch.setattr(GraphedForward, "_capture", refuse)
    for _ in range(2):
        assert torch.equal(model(x, t)[0], expected)
    assert [record.getMessage() for record in caplog.records] == [
        "Denoiser runs without CUDA graphs: operation not permitted when stream is capturing"
    ]


@torch.no_grad()
def test_a_call_that_is_wrong_in_itself_says_so_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replay_graphs(Denoiser())
    monkeypatch.setattr(graphs, "capture_key", lambda *_: "a call")
    monkeypatch.setattr(GraphedForward, "_capture", lambda self, *_: self.own(torch.randn(2, 7), torch.ones(1)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 7), torch.ones(1))
    assert graphed(model).failure is None


@torch.no_grad()
def test_torch_compile_runs_without_graphs_and_says_what_that_costs(caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "vdit_quant"]

    model = Denoiser()
    x, t = torch.randn(2, 8), torch.tensor([1.0])
    expected = model(x, t)[0]
    compiled = torch.compile(replay_graphs(model), backend="eager", fullgraph=True)
    for rows in (2, 3):  # the second is compiled anew
        assert torch.allclose(compiled(x[:1].expand(rows, 8), t)[0], expected[:1].expand(rows, 8))
    (message,) = said()
    assert "Denoiser" in message
    assert 'mode="reduce-overhead"' in message
    caplog.clear()
    torch.compile(replay_graphs(Denoiser(), enabled=False), backend="eager", fullgraph=True)(x, t)
    assert not said()


@torch.no_grad()
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_a_copy_captures_its_own_graphs(
    make: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(self: GraphedForward, leaves: list[Tensor], tree: object) -> SimpleNamespace:
        held = threading.Lock()  # no more to be copied than a graph
        weight = self.model.layer.weight.detach().clone()  # which a graph reads where it lies
        return SimpleNamespace(held=held, replay=lambda leaves: None, outputs=(weight @ leaves[0],))

    monkeypatch.setattr(graphs, "capture_key", lambda *_: "a call")
    monkeypatch.setattr(GraphedForward, "_capture", capture)
    model: Any = replay_graphs(Denoiser())
    x = torch.randn(8)
    before = model(x)[0]
    other: Any = make(model)
    other.layer.weight.mul_(2)
    assert torch.equal(other(x)[0], 2 * before)
    assert torch.equal(model(x)[0], before)
    assert graphed(other).model is other


class Memory:
    """Stands in for a GPU's: graphs that are held, and what else there is, share `room`."""

    def __init__(self, model: nn.Module, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphed, self.room, self.tries = graphed(model), room, 0
        monkeypatch.setattr(graphs, "capture_key", lambda leaves, *_: int(leaves[0].shape[0]))
        monkeypatch.setattr(GraphedForward, "_capture", lambda _, leaves, tree: self.capture(leaves[0].shape[0]))

    @property
    def used(self) -> int:
        return sum(capture.size for capture in self.graphed._graphs.values())

    def capture(self, size: int) -> SimpleNamespace:
        self.tries += 1
        if self.used + size > self.room:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory.\nand more")
            finally:
                if size > 5:  # what ends the capture may fail too
                    raise RuntimeError("operation failed due to a previous error during capture")
        return SimpleNamespace(size=size, replay=lambda leaves: None, outputs=f"graph of {size}")

    def run(self, x: Tensor, *_: object) -> str:
        if self.used + x.shape[0] > self.room + 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return f"run of {x.shape[0]}"


@torch.no_grad()
def test_where_memory_is_short_graphs_go_and_shapes_do_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = replay_graphs(Denoiser())
    memory = Memory(model, 4, monkeypatch)
    graphed(model).own = memory.run
    t = torch.zeros(1)

    def call(size: int) -> str:
        found: str = model(torch.zeros(size, 8), t)
        return found

    assert [call(2), call(1), call(4)] == ["graph of 2", "graph of 1", "graph of 4"]
    assert (list(graphed(model)._graphs), memory.tries) == ([4], 4)  # the others made room, at the second try
    assert [call(5), call(5)] == ["run of 5", "run of 5"]
    assert memory.tries == 6  # twice for the first call, never again
    assert call(1) == "graph of 1"
    assert call(4) == "graph of 4"
    assert call(5) == "run of 5"  # for which a graph made room
    assert list(graphed(model)._graphs) == []
    with pytest.raises(torch.OutOfMemoryError):
        call(6)
    assert call(3) == "graph of 3"
    assert graphed(model).failure is None
    assert [record.getMessage() for record in caplog.records] == [
        f"Denoiser runs without a CUDA graph for inputs of shapes [{size}, 8], [1]: CUDA out of memory."
        for size in (5, 6)
    ]
    graphed(model).reset()
    memory.room = 9
    assert call(5) == "graph of 5"


@pytest.mark.gpus(1)
@pytest.mark.parametrize("device", ["cuda", pytest.param("cuda:1", marks=pytest.mark.gpus(2))])
@torch.no_grad()
def test_replays_equal_the_model_and_follow_shapes_and_values(device: str) -> None:
    model = Denoiser().to(device)
    own = Denoiser().to(device)
    own.load_state_dict(model.state_dict())
    replay_graphs(model)
    for batch in (2, 3, 2):
        for scale in (1.0, 2.0):
            x, t = torch.randn(batch, 8, device=device), torch.rand(1, device=device)
            assert torch.equal(model(x, t, scale)[0], own(x, t, scale)[0])
    assert graphed(model).captures == 4


@pytest.mark.gpus(1)
@torch.no_grad()
def test_replays_under_autocast_read_nothing_that_was_freed() -> None:
    model, t = replay_graphs(Denoiser().cuda()), torch.zeros(1, device="cuda")
    x = torch.randn(2, 8, device="cuda")
    found = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            found.append(model(x, t)[0])
        torch.full((1 << 20,), torch.nan, device="cuda")  # takes the place of what autocast let go
    assert graphed(model).captures == 1
    assert torch.equal(found[0], found[1])


@pytest.mark.gpus(1)
@torch.no_grad()
def test_a_result_outlives_the_next_call() -> None:
    model = replay_graphs(Denoiser().cuda())
    t = torch.zeros(1, device="cuda")
    first = model(torch.ones(2, 8, device="cuda"), t)[0]
    kept = first.clone()
    model(torch.zeros(2, 8, device="cuda"), t)
    assert torch.equal(first, kept)


@pytest.mark.gpus(1)
@torch.no_grad()
def test_moved_weights_are_captured_anew() -> None:
    model = replay_graphs(Denoiser().cuda())
    x, t = torch.randn(2, 8, device="cuda"), torch.zeros(1, device="cuda")
    model(x, t)
    model.to("cpu").to("cuda")
    model.layer.weight.zero_()
    assert torch.equal(model(x, t)[0], model.layer.bias.expand(2, 8))


@pytest.mark.gpus(1)
@torch.no_grad()
def test_old_shapes_are_dropped_beyond_the_limit() -> None:
    model = replay_graphs(Denoiser().cuda(), limit=2)
    t = torch.zeros(1, device="cuda")
    for batch in (1, 2, 3):
        model(torch.ones(batch, 8, device="cuda"), t)
    assert len(graphed(model)._graphs) == 2


class Wide(Denoiser):
    """Takes 64 MiB for each row of its input."""

    def forward(self, x: Tensor, timestep: Tensor, scale: float = 1.0, extra: object = None) -> tuple[Tensor, ...]:
        room = x.new_empty(len(x), 1 << 24)
        return (super().forward(x, timestep, scale)[0] + room[:, :8].zero_(),)


@pytest.mark.gpus(1)
@torch.no_grad()
def test_a_graph_that_finds_no_memory_beside_another_takes_its_place(caplog: pytest.LogCaptureFixture) -> None:
    model, t = replay_graphs(Wide().cuda()), torch.zeros(1, device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 1000 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        for rows in (6, 10, 6):
            x = torch.randn(rows, 8, device="cuda")
            assert torch.equal(model(x, t)[0], model.layer(x) + t)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert graphed(model).captures == 3
    assert graphed(model).failure is None
    assert caplog.records == []


class Dropping(Denoiser):
    """Lets go of other models while it is captured, and gives Python's garbage collector cause to free them."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[nn.Module] = []

    def forward(self, x: Tensor, timestep: Tensor, scale: float = 1.0, extra: object = None) -> tuple[Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            self.others.clear()
            extra = [[] for _ in range(100_000)]
        return super().forward(x, timestep, scale, extra)


@pytest.mark.gpus(1)
@torch.no_grad()
def test_a_graph_that_nobody_keeps_does_not_end_the_capture_of_another() -> None:
    x, t = torch.randn(2, 8, device="cuda"), torch.zeros(1, device="cuda")
    gc.collect()
    gc.freeze()  # collections are rarer the more there is
    try:
        other, model = replay_graphs(Denoiser().cuda()), replay_graphs(Dropping().cuda())
        other(x, t)
        model.others.append(other)
        del other  # from now on reachable from itself alone, once the list is cleared
        model(x, t)
    finally:
        gc.unfreeze()
    assert graphed(model).captures == 1
    assert graphed(model).failure is None


@pytest.mark.gpus(1)
@torch.no_grad()
def test_an_argument_that_is_no_tensor_or_value_runs_uncaptured() -> None:
    model = replay_graphs(Denoiser().cuda())
    model(torch.ones(1, 8, device="cuda"), torch.zeros(1, device="cuda"), extra=object())
    assert graphed(model).captures == 0
