"""What is changed inside a fused block takes effect, and what is undone again leaves the block fused."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import PyramidAttentionBroadcastConfig, attention_backend
from small_models import CASES, Case, call, close, compressed
from torch import Tensor, nn

from vdit_quant.runtime.fusion import FusedBlock, fuse, report, unfuse
from vdit_quant.runtime.graphs import replay_graphs

WAN = CASES["wan"]
WAN_WITH_NORMS = replace(WAN, config={**WAN.config, "cross_attn_norm": True})


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize(
    "case", [CASES["cogvideox"], CASES["large_dit"], WAN_WITH_NORMS], ids=["cogvideox", "large_dit", "wan"]
)
def test_loaded_norms_are_used(case: Case, assign: bool) -> None:
    model = fuse(compressed(case, "w8-a8tok"), cpu=True)
    before = call(model, case)
    state = {name: t * 1.7 if "norm" in name and t.dim() == 1 else t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    after = call(model, case)
    assert not close(after, before)
    assert close(after, call(unfuse(model), case))


def is_fused(model: nn.Module, case: Case) -> bool:
    """Whether there are fused blocks and each of them runs its fused forward."""
    own, seen = FusedBlock.own, []

    def counted(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return own(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedBlock, "own", counted)
        call(model, case)
    return not seen and any("_fused_block" in vars(module) for module in model.modules())


class Nothing(nn.Module):
    """A feed-forward, norm or attention that says nothing."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("name", ["ff", "ff.net", "attn1", "norm3"])
def test_another_module_inside_is_called(name: str) -> None:
    case = CASES["dit"]
    model = fuse(compressed(case, "w8-a8tok"), cpu=True)
    before = call(model, case)
    block = model.transformer_blocks[1]
    old = block.get_submodule(name)
    block.set_submodule(name, nn.ModuleList([Nothing()]) if name == "ff.net" else Nothing())
    after = call(model, case)
    assert not close(after, before)
    assert close(after, call(unfuse(copy.deepcopy(model)), case))
    block.set_submodule(name, old)
    assert is_fused(model, case)


def test_another_class_of_a_block_is_called() -> None:
    case = CASES["dit"]
    model = fuse(compressed(case, "w8-a8tok"), cpu=True)
    block = model.transformer_blocks[1]

    class Silent(type(block)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return torch.zeros_like(super().forward(hidden_states, *args, **kwargs))

    before = call(model, case)
    block.__class__ = Silent
    after = call(model, case)
    assert not close(after, before)
    assert close(after, call(unfuse(model), case))


def test_another_module_inside_is_not_replayed_over() -> None:
    model = nn.Sequential(nn.Sequential(nn.Identity()))
    graphed = replay_graphs(model)._graphed_forward
    assert not graphed._is_disturbed()
    model[0][0] = nn.Identity()
    assert graphed._is_disturbed()


def test_blocks_are_fused_again_after_offloading() -> None:
    case = CASES["flux"]
    model = fuse(compressed(case, "w8-a8tok"), cpu=True)
    before = call(model, case)
    assert is_fused(model, case)
    cpu_offload(model, torch.device("cpu"))
    remove_hook_from_module(model, recurse=True)
    assert is_fused(model, case)
    assert is_fused(fuse(model, cpu=True), case)
    assert close(call(model, case), before)


def test_blocks_are_fused_again_after_caching() -> None:
    case = CASES["cogvideox"]
    model = fuse(compressed(case, "w8-a8tok"), cpu=True)
    skipping = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(skipping)
    assert not is_fused(model, case)
    model.disable_cache()
    assert is_fused(model, case)
    assert is_fused(fuse(model, cpu=True), case)


def test_a_model_that_was_offloaded_before_is_fused() -> None:
    case = CASES["flux"]
    model = compressed(case, "w8-a8tok")
    cpu_offload(model, torch.device("cpu"))
    remove_hook_from_module(model, recurse=True)
    assert report(model, ["transformer_blocks.0"]) == {"FluxTransformerBlock": "1 fused"}
    assert is_fused(fuse(model, cpu=True), case)


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_a_back_end_chosen_for_all_attention_is_used(kind: str) -> None:
    case = CASES[kind]
    model = fuse(compressed(case, "w8-a8tok"), cpu=True)
    assert is_fused(model, case)
    with attention_backend("_native_math"):
        assert not is_fused(model, case)
    assert is_fused(model, case)


def test_a_back_end_chosen_for_all_attention_changes_nothing_for_processors_that_do_not_ask() -> None:
    case = CASES["sd3"]
    model = fuse(compressed(case, "w8-a8tok"), cpu=True)
    with attention_backend("_native_math"):
        assert is_fused(model, case)
