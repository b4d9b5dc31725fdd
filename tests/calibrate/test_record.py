"""What the recorder gathers is what the layers were given, by timestep bin and guidance branch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdit_quant.calibrate.record import Recorder
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.family import find_family

Q, K, V = (f"transformer_blocks.1.attn1.to_{x}" for x in "qkv")
FF, MODULATION = "transformer_blocks.0.ff.net.2", "transformer_blocks.0.norm1.linear"
TIMES = (900, 600, 300, 0)
NEEDS = frozenset({"second_moment", "gram", "rows"})


@torch.no_grad()
def _observe(
    model: nn.Module, inputs: Callable[..., Any], names: tuple[str, ...], runs: int = 2
) -> tuple[dict[str, Any], dict[str, list[tuple[int, Tensor]]]]:
    """Statistics of two sampling runs of four steps, and every input the layers saw with its step."""
    seen: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in names}
    step = 0

    def note(name: str) -> Any:
        return lambda module, args: seen[name].append((step, args[0].clone()))

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    recorder = Recorder(model, find_family(model), dict.fromkeys(names, NEEDS), steps=len(TIMES), bins=2, rows=3)
    with recorder:
        for run in range(runs):
            for step, time in enumerate(TIMES):  # the hooks read step
                model(**{**inputs(model, batch=4, seed=10 * run + step), "timestep": torch.full((4,), time)})
    for handle in handles:
        handle.remove()
    return recorder.result(), seen


@pytest.mark.parametrize("name", [Q, FF])
def test_absmax_by_bin_and_branch_is_that_of_the_inputs(
    name: str, tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any]
) -> None:
    stats, seen = _observe(tiny_dit(), dit_inputs, (name,))
    for bin_index in range(2):
        for branch, rows in ((0, slice(0, 2)), (1, slice(2, 4))):
            parts = [x[rows].flatten(0, -2) for step, x in seen[name] if step // 2 == bin_index]
            assert torch.equal(stats[name].absmax[bin_index, branch], torch.cat(parts).abs().amax(0))


def test_moments_count_every_row(tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any]) -> None:
    stats, seen = _observe(tiny_dit(), dit_inputs, (FF, MODULATION))
    for name in (FF, MODULATION):
        x = torch.cat([x.reshape(-1, x.shape[-1]) for _, x in seen[name]])
        assert stats[name].count == len(x)
        torch.testing.assert_close(stats[name].second_moment, x.square().sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stats[name].gram, x.T @ x, rtol=1e-4, atol=1e-3)
        rows = stats[name].rows
        assert rows is not None
        assert all((x == row).all(1).any() for row in rows)


def test_q_k_and_v_of_one_attention_share_their_statistics(
    tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any]
) -> None:
    stats, seen = _observe(tiny_dit(), dit_inputs, (Q, K, V))
    assert stats[Q] is stats[K] is stats[V]
    assert stats[K].count == sum(x[..., 0].numel() for _, x in seen[K])
    alone, _ = _observe(tiny_dit(), dit_inputs, (V,))
    assert torch.equal(alone[V].absmax, stats[V].absmax)


def test_the_hooks_are_gone_afterwards(tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any]) -> None:
    model = tiny_dit()
    stats, _ = _observe(model, dit_inputs, (Q,))
    before = stats[Q].count
    model(**dit_inputs(model))
    assert stats[Q].count == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_names_the_layer(
    value: float, tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any]
) -> None:
    model = tiny_dit()
    model.get_submodule("transformer_blocks.0.ff.net.0.proj").bias.data[7] = value
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.ff\.net\.2.*NaN or infinity"):
        _observe(model, dit_inputs, ("transformer_blocks.0.ff.net.0.proj", FF))


def test_a_layer_that_never_runs_is_named(tiny_dit: Callable[..., Any], dit_inputs: Callable[..., Any]) -> None:
    model = tiny_dit()
    model.spare = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"spare never ran.*--keep 'spare'"):
        _observe(model, dit_inputs, (Q, "spare"))
