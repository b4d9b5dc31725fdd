"""What the recorder gathers is what the layers were given, by timestep bin and guidance branch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdit_quant.calibrate.model_source import ModelSource
from vdit_quant.calibrate.plan import LayerPlan
from vdit_quant.calibrate.record import BINS, Recorder
from vdit_quant.calibrate.replay import BlockChain, Place
from vdit_quant.calibrate.statistics import default_memory, unit_bytes
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.family import find_family
from vdit_quant.runtime.source import find_source
from vdit_quant.runtime.step import StepTracker

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


class Attention(nn.Module):
    """Runs the layers that a call names, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden_states: Tensor, timestep: Tensor, calls: str, context: Tensor | None = None) -> Tensor:
        for name in calls:  # a capital letter: the layer reads the context
            layer = self.get_submodule({"o": "out"}.get(name.lower(), name.lower()))
            layer(context if name.isupper() else hidden_states)
        return hidden_states


@torch.no_grad()
@pytest.mark.parametrize(
    "calls",
    [
        ("qkv", "qKV"), ("qkv", "qKv"), ("qkv", "KVq"), ("qkv", "qoK"), ("qkv", "q"), ("qkv", "q", "qkv"), ("q", "qk"),
        ("qkv", "qkk"), ("qkv", "qkv", "qkV", "qkv"), ("qkv", "QkV", "qkv"),
    ],
)  # fmt: skip
def test_layers_that_part_have_the_statistics_of_what_each_was_given(calls: tuple[str, ...]) -> None:
    def record(names: str) -> dict[str, Any]:
        model, draw = Attention(), torch.Generator().manual_seed(0)
        layers = ["out" if name == "o" else name for name in names]
        with Recorder(model, find_family(model), dict.fromkeys(layers, NEEDS), len(calls), rows=2) as recorder:
            for number, call in enumerate(calls):
                x, context = torch.randn(2, 1, 4, 8, generator=draw)
                model(x, torch.tensor([900.0 - number]), call, 100 * context)
        return recorder.result()

    names = "".join(sorted(set("".join(calls).lower())))
    together = record(names)
    for name, stats in together.items():
        alone = record(name[0])[name].to_tensors()
        assert all(torch.equal(t, alone[key]) for key, t in stats.to_tensors().items()), name


TEXT = ("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn2.to_v", "caption_projection.linear_1")
BLOCK = ["transformer_blocks.0"]
IMAGE = ("transformer_blocks.0.attn1.to_k", "transformer_blocks.0.attn2.to_q")


def _pixart(padding: float, mask: Tensor | None) -> tuple[nn.Module, dict[str, Any]]:
    """A model of 16 image tokens, and a call with 4 samples of 16 text tokens, those after the seventh `padding`."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        cross_attention_dim=16, caption_channels=32, use_additional_conditions=False,
    ).eval()  # fmt: skip
    text = torch.randn(4, 16, 32)
    text[:, 7:] = padding
    call = {"hidden_states": torch.randn(2, 4, 8, 8).repeat(2, 1, 1, 1), "encoder_hidden_states": text}
    call |= {"timestep": torch.full((4,), 500), "encoder_attention_mask": mask}
    return model, {**call, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


@torch.no_grad()
def _text_stats(padding: float, mask: Tensor | None) -> dict[str, Any]:
    model, call = _pixart(padding, mask)
    with Recorder(model, find_family(model), dict.fromkeys(TEXT + IMAGE, NEEDS), 1) as recorder:
        model(**call)
    return recorder.result()


def _masks() -> dict[str, Tensor]:
    ones = torch.arange(16).expand(4, 16) < 7
    return {"bool": ones, "float": ones.float(), "added": ((~ones) * -10000.0)[:, None]}


@pytest.mark.parametrize("kind", ["bool", "float", "added"])
def test_text_that_the_mask_leaves_out_is_not_counted(kind: str) -> None:
    mask: Tensor = _masks()[kind]
    if kind == "bool":
        mask = mask.long()  # what a tokenizer gives
    stats, other = _text_stats(0.0, mask), _text_stats(3.0, mask)
    for name in TEXT:
        assert stats[name].count == 4 * 7
        for key, value in stats[name].to_tensors().items():
            assert torch.equal(value, other[name].to_tensors()[key]), (name, key)
    assert all(stats[name].count == 4 * 16 for name in IMAGE), "as many tokens as the text has, and none of it"
    assert stats[TEXT[0]] is stats[TEXT[1]]


@torch.no_grad()
def test_a_block_that_runs_alone_follows_the_mask_of_the_whole_models_call(tmp_path: Path) -> None:
    mask = _masks()["float"]
    (model, call), names = _pixart(0.0, mask), TEXT[:2] + IMAGE
    family = find_family(model)
    with StepTracker(model, family) as tracker, BlockChain(model, BLOCK, tracker, tmp_path) as chain:
        model(**call)
        chain.stop()
        with Recorder(model, family, dict.fromkeys(names, NEEDS), 1, place=Place()) as recorder:
            chain.run(0, torch.device("cpu"), recorder.go_to)
    whole = _text_stats(0.0, mask)
    for name, stats in recorder.result().items():
        assert all(torch.equal(t, whole[name].to_tensors()[key]) for key, t in stats.to_tensors().items()), name


def test_text_is_counted_whole_without_a_mask_or_where_it_leaves_nothing() -> None:
    for mask in (None, torch.zeros(4, 16), torch.ones(4, 16)):
        assert _text_stats(0.0, mask)[TEXT[0]].count == 4 * 16


def test_the_memory_that_statistics_are_said_to_take_is_not_exceeded() -> None:
    k, spec = 64, LayerSpec.parse("w4g64-a8tok")
    plan = LayerPlan("layer", "attention", 8, k, None, spec, "", "viditq", {"rotate": "search"})
    needs = plan.needs()
    assert {"gram", "rows"} <= needs
    model = nn.ModuleDict({"layer": nn.Linear(k, 8)})
    recorder = Recorder(model, find_family(model), {"layer": needs}, BINS)
    with recorder:
        for _ in range(200):
            model["layer"](torch.randn(1, 64, k))
    taken = sum(t.nbytes for t in recorder.result()["layer"].to_tensors().values())
    assert taken <= unit_bytes(("block", [plan]))
    assert taken > 0.8 * unit_bytes(("block", [plan]))


def test_statistics_may_take_half_of_what_a_gpu_has_free_beside_the_pipeline(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: (10_000_000_000, 20_000_000_000))
    held = sum(path.stat().st_size for path in demo.rglob("*.safetensors"))
    assert default_memory(find_source(demo), torch.device("cuda")) == 0.5 * (10_000_000_000 - held)
    assert default_memory(find_source(demo), torch.device("cpu")) == 0.5e9
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    assert default_memory(ModelSource(model), torch.device("cuda")) == 0.5 * (10_000_000_000 - 2 * 72)
