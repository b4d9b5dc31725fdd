"""What is put on a loaded model takes effect, fused or captured: hooks, attention processors, tensors, settings."""

import copy
import gc
import pickle
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import vdit_quant
from vdit_quant.kernels import dispatch
from vdit_quant.quantize.recipe import Recipe
from vdit_quant.runtime import capture as capturing
from vdit_quant.runtime import graphs
from vdit_quant.runtime.capture import Capture
from vdit_quant.runtime.fusion import fuse, unfuse
from vdit_quant.runtime.graphs import replay_graphs
from vdit_quant.runtime.linear import CompressedLinear
from vdit_quant.runtime.schedule import StepPlan, apply_plans, apply_step_plan

RECIPE = Recipe.from_dict(
    {
        "step": [
            {
                "method": "viditq",
                "spec": "w4g16-a8tok",
                "roles": ["attention", "feed_forward"],
                "params": {"smooth": "fixed", "fold": False, "rotate": "always", "hadamard": 16},
            },
            {"method": "rtn", "spec": "w8", "roles": ["modulation"]},
        ]
    },
    "scaled and rotated",
)
Load = Callable[..., nn.Module]


class Silent(AttnProcessor2_0):
    """An attention that says nothing."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


@pytest.fixture(scope="module")
def artifacts(tiny_dit: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed not in made:
            folder = tmp_path_factory.mktemp("interference")
            tiny_dit(seed).save_pretrained(folder / "model")
            made[seed] = vdit_quant.compress(folder / "model", folder / "artifact", recipe=RECIPE, steps=2, samples=2)
        return made[seed]

    return make


@pytest.fixture
def load(artifacts: Callable[[int], Path]) -> Load:
    """The tiny DiT of a seed, compressed, fused even on this CPU."""
    return lambda seed=0: fuse(vdit_quant.load(artifacts(seed), device="cpu"), cpu=True)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_new_attention_processor_is_called(load: Load, dit_inputs: Callable[..., Any]) -> None:
    model = load()
    inputs = dit_inputs(model)
    before = model(**inputs).sample
    model.transformer_blocks[1].attn1.set_processor(Silent())
    found = model(**inputs).sample
    assert relative(found, before) > 0.01
    assert relative(found, unfuse(model)(**inputs).sample) < 2e-3


def test_a_chosen_attention_back_end_is_used(load: Load, dit_inputs: Callable[..., Any]) -> None:
    model = load()
    block = model.transformer_blocks[0]
    fused = block.__dict__["forward"].__self__
    assert fused.accepts(torch.zeros(1, 4, 64))
    block.attn1.processor._attention_backend = "native"
    assert not fused.accepts(torch.zeros(1, 4, 64))


@pytest.mark.parametrize("inner", ["attn1", "norm3", "ff", "norm1", "ff.net.0"])
def test_a_hook_inside_a_block_runs_at_every_call(inner: str, load: Load, dit_inputs: Callable[..., Any]) -> None:
    model, seen = load(), []
    handle = model.transformer_blocks[0].get_submodule(inner).register_forward_hook(lambda *_: seen.append(1))
    inputs = dit_inputs(model)
    model(**inputs)
    model(**inputs)
    assert len(seen) == 2
    handle.remove()
    assert model.transformer_blocks[0].__dict__["forward"].__self__.accepts(torch.zeros(1, 4, 64))


@pytest.mark.parametrize("change", ["none", "copied", "cast and back"])
def test_tensors_of_another_model_are_used_at_once(change: str, load: Load, dit_inputs: Callable[..., Any]) -> None:
    model, other = load(0), load(1)
    inputs = dit_inputs(model)
    model(**inputs)
    if change == "copied":
        model = copy.deepcopy(model)
    for block in model.transformer_blocks if change == "cast and back" else ():
        block.to(torch.float64).to(torch.float32)
    model.load_state_dict(other.state_dict())
    assert relative(model(**inputs).sample, other(**inputs).sample) < 2e-3


@pytest.mark.slow
def test_a_block_that_runs_its_own_forward_compiles_too(
    artifacts: Callable[[int], Path], dit_inputs: Callable[..., Any]
) -> None:
    torch._dynamo.reset()
    model = vdit_quant.load(artifacts(0), device="cpu")
    inputs = dit_inputs(model)
    expected = model(**inputs).sample
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).sample, expected)


PLAN = StepPlan(((400.0, 1000.0),))


def lifted(model: nn.Module) -> set[bool]:
    return {bool(m.is_lifted) for m in model.modules() if isinstance(m, CompressedLinear) and m.spec.activation}


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_a_copy_follows_its_step_plan_by_itself(
    make: Callable[[nn.Module], nn.Module], load: Load, dit_inputs: Callable[..., Any]
) -> None:
    model = load()
    apply_step_plan(model, PLAN)
    other, inputs = make(model), dit_inputs(model)
    other(**inputs)
    assert (lifted(other), lifted(model)) == ({True}, {False})
    other(**{**inputs, "timestep": torch.full((2,), 100)})
    assert lifted(other) == {False}


def test_a_model_follows_the_plan_of_the_artifact_that_it_was_filled_from_last(
    artifacts: Callable[[int], Path], load: Load, dit_inputs: Callable[..., Any]
) -> None:
    model = load()
    apply_plans(model, {"steps": PLAN.to_dict()})
    model(**dit_inputs(model))
    assert lifted(model) == {True}
    held = weakref.ref(model.transformer_blocks[0].attn1.to_q)
    vdit_quant.load_into(model, artifacts(0))  # of no plan
    gc.collect()
    assert held() is None, "the plan holds the layers that were replaced"
    model(**dit_inputs(model))
    assert lifted(model) == {False}


def test_a_step_plan_is_followed_behind_a_replaced_forward(load: Load, dit_inputs: Callable[..., Any]) -> None:
    model = replay_graphs(load())
    apply_step_plan(model, PLAN)
    model(*dit_inputs(model).values())
    assert lifted(model) == {True}


class Doubler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Identity())])
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        doubled: Tensor = self.blocks[0](x) * 2
        return doubled


class Recording:
    """Stands in for a captured graph."""

    def replay(self) -> None:
        pass


@pytest.fixture
def doubler(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Doubler, Tensor]]:
    """A model that replays, on a GPU that is not there: `runs` counts what is not replayed."""

    def capture(call: Callable[[Any], Any], leaves: list[Any], tree: Any, *_: Any) -> Capture:
        return Capture(Recording(), [leaf.clone() for leaf in leaves], call(pytree.tree_unflatten(leaves, tree)))

    monkeypatch.setattr(graphs, "capture_call", capture)
    monkeypatch.setattr(graphs, "compile_ahead", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    model = Doubler()
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        replay_graphs(model)(x)
        model(x)
        assert model.runs == 1
        yield model, x


def test_settings_of_the_kernels_are_not_replayed_over(doubler: tuple[Doubler, Tensor]) -> None:
    model, x = doubler
    with dispatch.use(mode="reference"):
        model(x)
    assert model.runs == 2
    model(x)
    assert model.runs == 2


def test_training_mode_is_not_replayed_over(doubler: tuple[Doubler, Tensor]) -> None:
    model, x = doubler
    model.eval()(x)
    assert model.runs == 2
    model.train()(x)
    model.eval()(x)
    assert model.runs == 2


def test_autocast_is_not_replayed_over(doubler: tuple[Doubler, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = doubler
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    model(x)
    assert model.runs == 2


@pytest.mark.parametrize("what", ["hook", "forward"])
def test_what_acts_inside_is_not_replayed_over(what: str, doubler: tuple[Doubler, Tensor]) -> None:
    model, x = doubler
    if what == "hook":
        model.blocks[0][0].register_forward_hook(lambda *_: None)
    else:
        model.blocks[0][0].forward = lambda x: x
    model(x)
    assert model.runs == 2


@pytest.mark.parametrize("part", ["", "blocks.0"])
def test_a_graph_does_not_outlive_loaded_tensors(part: str, doubler: tuple[Doubler, Tensor]) -> None:
    model, x = doubler
    model.get_submodule(part).load_state_dict({}, strict=False)
    model(x)
    assert model.runs == 2


def test_moving_a_block_to_where_it_is_moves_nothing(load: Load) -> None:
    block = load().transformer_blocks[0]
    before = block.attn1.to_q._buffers["weight"].data_ptr()
    block.to("cpu")
    assert block.attn1.to_q._buffers["weight"].data_ptr() == before


def test_static_inputs_can_be_written_in_every_mode() -> None:
    with torch.inference_mode():
        made = capturing._ordinary(torch.ones(2))
    assert not made.is_inference()
    assert not made.requires_grad
    Capture(Recording(), [made], None).replay([torch.full((2,), 3.0)])
    assert made.tolist() == [3.0, 3.0]


def test_another_linear_layer_is_not_replayed_over(doubler: tuple[Doubler, Tensor]) -> None:
    model, x = doubler
    model.blocks[0].append(nn.Linear(3, 3))
    model.blocks[0][1].forward = lambda x: x  # nothing can be multiplied on a GPU that is not there
    replay_graphs(model)(x)
    runs = model.runs
    model(x)
    assert model.runs == runs
    model.blocks[0][1] = nn.Sequential(model.blocks[0][1])  # as an adapter does that peft puts in by itself
    model(x)
    assert model.runs == runs + 1


def test_a_cache_that_was_there_before_is_asked_at_every_call(doubler: tuple[Doubler, Tensor]) -> None:
    class Asked(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Asked.calls += 1
            return args, kwargs

    model, x = doubler
    replay_graphs(model, enabled=False)
    HookRegistry.check_if_exists_or_initialize(model.blocks[0]).register_hook(Asked(), "cache")
    replay_graphs(model)
    for _ in range(3):
        model(x)
    assert Asked.calls == 3


def test_graphs_are_switched_off_behind_what_was_put_around_the_model(doubler: tuple[Doubler, Tensor]) -> None:
    model, x = doubler
    inner = model.forward
    model.forward = lambda *args: inner(*args)
    model(x)
    assert model.runs == 1
    replay_graphs(model, enabled=False)
    model(x)
    assert model.runs == 2
    replay_graphs(model)
    model(x)
    model(x)
    assert model.runs == 3


def test_a_result_whose_tensors_would_not_be_copies_is_not_replayed(
    doubler: tuple[Doubler, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(Doubler):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(y=super().forward(x))

    _, x = doubler
    model = replay_graphs(Odd())
    assert model(x) is not model(x)
    assert "its result holds a SimpleNamespace" in caplog.text


def test_calls_from_several_threads_get_their_own_results(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """A graph that is replayed on what its one input holds, some time later."""

        def __init__(self, source: Tensor, result: Tensor) -> None:
            self.source, self.result = source, result

        def replay(self) -> None:
            time.sleep(0.002)
            self.result.copy_(2 * self.source)

    def capture(call: Callable[[Any], Any], leaves: list[Any], tree: Any, *_: Any) -> Capture:
        source, result = leaves[0].clone(), torch.empty_like(leaves[0])
        return Capture(Slow(source, result), [source], result)  # type: ignore[arg-type]

    monkeypatch.setattr(graphs, "capture_call", capture)
    monkeypatch.setattr(graphs, "compile_ahead", lambda *_: 0)
    monkeypatch.setattr(graphs, "capture_key", lambda *_: "a call")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    model = replay_graphs(Doubler())

    def run(number: int) -> bool:
        with torch.no_grad():
            x = torch.full((2,), float(number))
            return all(torch.equal(model(x), 2 * x) for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_casts_of_autocast_are_not_kept_where_a_graph_would_read_them() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        with capturing._uncached_casts(), CountCasts() as counted:
            layer(x)
            layer(x)
        assert counted.casts == 4  # weight and bias, each time
        assert torch.is_autocast_cache_enabled()
        with CountCasts() as counted:
            layer(x)
            layer(x)
        assert counted.casts == 2


class CountCasts(TorchDispatchMode):
    """Counts the casts of parameters."""

    casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.casts += func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
        return func(*args, **(kwargs or {}))
