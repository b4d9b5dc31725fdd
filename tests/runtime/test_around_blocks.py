"""What is put around and between fused blocks takes effect: skipped layers, offloading, caches, one layer's tensors."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import LayerSkipConfig, apply_group_offloading, apply_layer_skip
from small_models import CASES, call, close, compressed
from torch import nn

from vdit_quant.kernels import dispatch
from vdit_quant.runtime.fusion import FusedBlock, fuse, unfuse


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def blocks_of(model: nn.Module) -> list[nn.Module]:
    found = [module for module in model.modules() if "_fused_block" in vars(module)]
    assert found
    return found


class Counter(ModelHook):
    """Counts the calls of what it is put on."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def put_around(blocks: Iterable[nn.Module]) -> Counter:
    """One counter, put around all of them."""
    counter = Counter()
    for block in blocks:
        add_hook_to_module(block, counter)
    return counter


def test_blocks_skipped_on_both_sides_of_a_group_leave_the_others_their_text() -> None:
    case = replace(CASES["wan"], config={**CASES["wan"].config, "num_layers": 8})
    plain, fused = compressed(case, "w8-a8tok"), fuse(compressed(case, "w8-a8tok"), cpu=True)
    everything = call(plain, case)
    for model in (plain, fused):
        apply_layer_skip(model, LayerSkipConfig(indices=[3, 4], fqn="blocks"))
    skipped = call(plain, case)
    assert not close(skipped, everything)
    assert close(call(fused, case), skipped)


@pytest.mark.parametrize("kind", ["pixart", "wan", "flux"])
def test_weights_that_wait_elsewhere_are_not_read_before_their_block_runs(kind: str) -> None:
    case, model = CASES[kind], compressed(CASES[kind], "w8-a8tok")
    expected = call(model, case)
    cpu_offload(fuse(model, cpu=True), execution_device=torch.device("cpu"))
    # where the inputs go is read off the parameters, which are on the meta device now
    model.parameters = lambda *_, **__: iter([torch.zeros(1)])  # type: ignore[method-assign]
    assert close(call(model, case), expected)


@pytest.mark.parametrize("how", ["block_level", "leaf_level"])
@pytest.mark.parametrize("kind", ["pixart", "flux", "sd3"])
def test_groups_that_are_offloaded_run_as_before(kind: str, how: str, tmp_path: Path) -> None:
    case, model, here = CASES[kind], compressed(CASES[kind], "w8-a8tok"), torch.device("cpu")
    expected = call(model, case)
    options: dict[str, Any] = {"num_blocks_per_group": 1} if how == "block_level" else {}
    apply_group_offloading(
        fuse(model, cpu=True), onload_device=here, offload_device=here, offload_type=how,
        offload_to_disk_path=str(tmp_path), **options,
    )  # fmt: skip
    for _ in range(2):
        assert close(call(model, case), expected)


def test_fusing_again_keeps_what_was_put_around_a_block() -> None:
    case, model = CASES["dit"], fuse(compressed(CASES["dit"]), cpu=True)
    expected, counter = call(model, case), put_around(blocks_of(model))
    fuse(model, cpu=True)
    assert close(call(model, case), expected)
    assert counter.calls == len(blocks_of(model))


def test_unfusing_reaches_behind_what_was_put_around_a_block() -> None:
    case, model = CASES["dit"], fuse(compressed(CASES["dit"]), cpu=True)
    expected, counter = call(model, case), put_around(blocks_of(model))
    unfuse(model)
    assert [block._fused_block.accepts(torch.zeros(1, 4, 64)) for block in blocks_of(model)] == [False] * 3
    assert close(call(model, case), expected)
    assert counter.calls == 3
    fuse(model, cpu=True)
    assert all(block._fused_block.accepts(torch.zeros(1, 4, 64)) for block in blocks_of(model))


def test_a_block_that_something_was_put_around_before_is_left_alone_and_named() -> None:
    case, model = CASES["dit"], compressed(CASES["dit"])
    expected, counter = call(model, case), put_around(model.transformer_blocks)
    fuse(model, cpu=True)
    assert close(call(model, case), expected)
    assert counter.calls == 3
    assert "something was put around it before it was fused" in dispatch.fallbacks()["BasicTransformerBlock"]


def test_a_cache_around_fused_blocks_is_asked_and_they_stay_fused() -> None:
    case = CASES["flux"]
    model, plain = fuse(compressed(case), cpu=True), compressed(case)
    for each in (model, plain):
        each.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("c"), plain.cache_context("c"):
        first, again = (call(model, case, seed) for seed in (2, 3))
        assert close(first, call(plain, case, 2))
        assert close(again, call(plain, case, 3))  # of which only the first block ran
    assert all(block._fused_block.accepts(torch.zeros(1, 4, 64)) for block in blocks_of(model))


def test_context_parallelism_that_is_switched_on_later_is_followed() -> None:
    model = fuse(compressed(CASES["flux"]), cpu=True)
    block = blocks_of(model)[0]
    fused: FusedBlock = block._fused_block
    assert fused.accepts(torch.zeros(1, 4, 64))
    block.attn.processor._parallel_config = object()
    assert not fused.accepts(torch.zeros(1, 4, 64))


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_other_scales_of_single_layers_are_used_at_once(kind: str) -> None:
    case = CASES[kind]
    model = fuse(compressed(case, "w4g16-a8tok-s-h16"), cpu=True)
    before = call(model, case)
    for block in blocks_of(model):
        for attention in filter(None, (block.attn1, block.attn2)):
            for name in ("to_q", "to_k", "to_v"):
                layer = getattr(attention, name)
                tensors = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
                layer.load_state_dict({**tensors, "pre_quant_scale": 3 * tensors["pre_quant_scale"]})
    found = call(model, case)
    assert not close(found, before)
    assert close(found, call(unfuse(model), case))


def test_an_input_that_was_written_to_is_read_anew() -> None:
    case = CASES["pixart"]
    model = fuse(compressed(case), cpu=True)
    last = blocks_of(model)[-1]
    last.attn1.register_forward_hook(lambda *_: None)  # it leaves the others' share of its group behind
    blocks_of(model)[0].attn1.register_forward_hook(lambda *_: None)
    timestep = torch.tensor([300, 300])
    call(model, case, timestep=timestep)
    timestep.fill_(900)
    found = call(model, case, timestep=timestep)
    assert close(found, call(unfuse(model), case, timestep=timestep))
