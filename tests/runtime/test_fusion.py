"""Fused blocks: the same numbers as the model's own blocks, whatever is done to the model before or after."""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from small_models import CASES, Case, build, call, close, compress, compressed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vdit_quant.kernels import dispatch
from vdit_quant.quantize.low_rank import join_adapter
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime import linear, modulation, stage
from vdit_quant.runtime.attach import linear_layers
from vdit_quant.runtime.family import find_family
from vdit_quant.runtime.fused_ops import fused_ops
from vdit_quant.runtime.fusion import FusedBlock, _tell_compiled, fuse, report, unfuse
from vdit_quant.runtime.fusions.basic_block import BasicBlock
from vdit_quant.runtime.linear import CompressedLinear
from vdit_quant.runtime.modulation import Modulation


def fused_blocks(model: nn.Module) -> int:
    return sum(isinstance(getattr(m.__dict__.get("forward"), "__self__", None), FusedBlock) for m in model.modules())


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


FUSED = (
    "w8-a8tok", "w4g16-a8tok-h16", "w3g32-a8tok", "wvq2-a8tok", "wvq3-a8tok", "wt-a8tok", "wfp4-a8tok",
    "wfp4-ae2m1tok-h16", "we2m1g32-ae2m1tok", "wfp4-ae2m1g16-h32", "w8-ae2m1g32", "wvq3-ae2m1tok", "wt-ae2m1tok",
    "w8-a8tok-r4", "w4g16-a8tok-s-h16-r8", "wfp4-ae2m1g16-h32-r16", "wvq2-a8tok-r5", "w4g16-a4g16-s-h16-r4",
    "w4-a4tok", "wf8-af8tok", "wf8-af8tok-h16",
)  # fmt: skip
NOT_FUSED = {
    "w4g16": "activations stay in the compute dtype",
    "wmxfp4g32-amxfp4g32": "activations in mxfp4 have no int8 codes",
    "wmxfp4g32-ae2m1tok": "format mxfp4 is not exact in int8",
    "w4g16-r4": "activations stay in the compute dtype",
    "wmxfp4g32-a8tok-r4": "format mxfp4 is not exact in int8",
    "wf8-a8tok": "format fp8 is not exact in int8",
    "w8-af8tok": "format int8 is not exact in fp8",
    "wf8-af8tok-r4": "no fp8 product adds a low-rank branch",
}


@pytest.mark.parametrize("short_name", [*FUSED, *NOT_FUSED])
def test_fused_is_unfused(case: Case, short_name: str) -> None:
    model = compressed(case, short_name)
    expected = call(model, case)
    assert close(call(fuse(model, cpu=True), case), expected)
    assert torch.equal(call(unfuse(model), case), expected)
    assert fused_blocks(model) == 0


def test_layers_of_one_stage_may_differ(case: Case) -> None:
    key, out, down = ("wk", "wo", "w2") if case.kind == "LargeDiT" else ("to_k", "to_out.0", "net.2")
    model = compressed(case, specs={key: "w8-a8tok-h16", out: "w8", down: "w8-a8tok"})
    expected = call(model, case)
    fuse(model, cpu=True)
    assert fused_blocks(model) > 0
    assert close(call(model, case), expected)


@pytest.mark.parametrize("specs", [{}, {"to_out.0": "w8", "wo": "w8"}, {"net.2": "w8", "w2": "w8"}])
def test_in_bfloat16_fused_is_unfused(case: Case, specs: dict[str, str]) -> None:
    model = compressed(case, specs=specs)
    exact = call(model, case)
    model.to(torch.bfloat16)
    inputs = {name: torch.bfloat16 for name in case.shapes}
    expected = call(model, case, dtypes=inputs)
    found = call(fuse(model, cpu=True), case, dtypes=inputs)
    assert found.dtype == expected.dtype
    assert (found - expected).norm() < 2 * (expected - exact).norm()


def test_every_token_may_have_a_timestep_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["wan"]
    timesteps = torch.randint(1000, (2, 32))  # as in Wan 2.2, where the first frame is given
    model = compressed(case)
    expected = call(model, case, timestep=timesteps)
    fuse(model, cpu=True)
    monkeypatch.setattr(FusedBlock, "own", lambda *_: pytest.fail("a block was not fused"))
    assert close(call(model, case, timestep=timesteps), expected)


def test_a_block_without_attention_to_itself_is_left_alone() -> None:
    width = {"dim": 64, "num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64}
    kind = {"norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "only_cross_attention": True}
    block = diffusers.models.attention.BasicTransformerBlock(**width, **kind)
    assert BasicBlock().refusal(block) == "no attention to itself"


def test_on_a_cpu_nothing_changes_unless_asked(case: Case) -> None:
    model = compressed(case)
    expected = call(model, case)
    assert torch.equal(call(fuse(model), case), expected)


def test_merged_layers_hold_nothing_twice(case: Case) -> None:
    model = compressed(case)
    before = storage_bytes(model)
    fuse(model, cpu=True)
    call(model, case)
    assert storage_bytes(model) <= before


def storage_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_repeated_embedders_are_held_once_and_written_in_full() -> None:
    model = build(CASES["dit"])
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    compress(model)
    names, before = list(model.state_dict()), storage_bytes(model)
    fuse(model, cpu=True)
    embedder = sum(p.numel() * 4 for p in model.transformer_blocks[0].norm1.emb.parameters())
    assert storage_bytes(model) == before - 2 * embedder
    state = model.state_dict()
    assert list(state) == names
    written = [state[f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.weight"] for i in range(3)]
    assert len({t.data_ptr() for t in written}) == 3
    assert torch.equal(written[0], written[2])


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("place", ["whole", "part"])
def test_unlike_embedders_loaded_over_shared_ones_are_each_their_own(place: str, assign: bool) -> None:
    case = CASES["dit"]
    model, other = build(case), compressed(case)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    alike = copy.deepcopy(fuse(compress(model), cpu=True))
    expected, state = call(other, case), other.state_dict()
    if place == "whole":
        alike.load_state_dict(state, assign=assign)
    else:  # of a larger one
        state = {f"0.{name}": tensor for name, tensor in state.items()}
        nn.Sequential(alike).load_state_dict(state, assign=assign)
    assert close(call(alike, case), expected)
    assert close(call(fuse(alike, cpu=True), case), expected)


def test_like_embedders_loaded_over_shared_ones_stay_shared() -> None:
    case = CASES["dit"]
    model = build(case)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    fuse(compress(model), cpu=True)
    state = {name: 1.1 * t if ".emb." in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    assert len({block.norm1.emb for block in model.transformer_blocks}) == 1
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    assert torch.equal(model.state_dict()[name], state[name])


def test_embedders_that_differ_are_not_shared() -> None:
    model = compressed(CASES["dit"])
    expected = call(model, CASES["dit"])
    assert close(call(fuse(model, cpu=True), CASES["dit"]), expected)


@pytest.mark.parametrize("change", ["cast", "copy", "reload"])
def test_a_changed_model_is_followed(case: Case, change: str) -> None:
    model = compressed(case)
    fuse(model, cpu=True)
    call(model, case)
    if change == "copy":
        model = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    for layer in layers:
        if change == "cast":
            layer.load_tensors({k: t.clone() for k, t in layer.tensors().items()}, layer.bias)
        else:
            scale = {"weight_scale": layer.tensors()["weight_scale"] * 0.5}
            layer.load_tensors({**{k: t.clone() for k, t in layer.tensors().items()}, **scale}, layer.bias)
    found = call(model, case)
    assert close(found, call(unfuse(model), case))


def test_moving_a_model_joins_its_layers_again(case: Case) -> None:
    model = fuse(compressed(case), cpu=True)
    expected = call(model, case)
    moved = model.to(torch.float64).to(torch.float32)  # every float tensor is a new one
    assert torch.equal(call(moved, case), expected)


@pytest.mark.parametrize("trouble", ["hook", "wrapper", "lifted", "training"])
def test_what_a_stage_cannot_know_runs_as_it_is(case: Case, trouble: str) -> None:
    model = fuse(compressed(case), cpu=True)
    call(model, case)
    name = next(n for n in linear_layers(model) if n.endswith(("to_k", "wk")) and "att" in n)
    layer = model.get_submodule(name)
    seen = []
    if trouble == "hook":
        layer.register_forward_hook(lambda *_: seen.append(1))
    elif trouble == "wrapper":
        model.set_submodule(name, Doubled(layer))
    elif trouble == "lifted":
        layer.active_spec = LayerSpec(layer.spec.weight, hadamard=layer.spec.hadamard)
    else:
        model.train()
    found = call(model, case)
    assert close(found, call(unfuse(model), case))
    assert not seen or len(seen) == 2


class Doubled(nn.Module):
    """What a LoRA does to a layer, as far as a stage can tell."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base_layer(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "short_name"),
    [*((kind, "w4g16-a8tok-h16") for kind in CASES), ("dit", "wf8-af8tok"), ("wan", "wf8-af8tok")],
)
def test_torch_compile_has_no_graph_break(kind: str, short_name: str) -> None:
    torch._dynamo.reset()
    case = CASES[kind]
    case = replace(case, config={**case.config, "num_layers": 2})  # tracing takes most of the time
    model = fuse(compress(build(case), short_name), cpu=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = call(model, case)
    assert torch.equal(call(compiled, case), expected)


def test_fused_blocks_are_not_compiled_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    _tell_compiled.cache_clear()
    case, seen = CASES["wan"], list[str]()
    model = fuse(compressed(case), cpu=True)
    expected = call(model, case)

    def backend(graph: Any, _inputs: Any) -> Any:
        seen.append(type(graph).__name__)
        return graph.forward

    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    assert torch.equal(call(model, case), expected)
    assert not seen
    assert caplog.text.count("not compiled one by one") == 1
    unfuse(model).compile_repeated_blocks(backend=backend, fullgraph=True)
    assert close(call(model, case), expected)
    assert len(seen) == 1, "blocks alike are compiled once"


@pytest.mark.parametrize(("kind", "tokens"), [("pixart", 6), ("wan", 5)])
def test_keys_and_values_of_a_text_are_made_for_several_blocks_at_once(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six blocks are a group of four and one of two; a block whose layers read the text in another way has its group
    make them one by one."""
    rows, counted, act = 2 * tokens, list[int](), stage.act_quant
    monkeypatch.setattr(stage, "act_quant", lambda x, *rest: (counted.append(len(x)), act(x, *rest))[1])
    for specs, products in (({}, 2), ({"5.attn2.to_k": "w8-ae2m1tok", "5.attn2.to_v": "w8-ae2m1tok"}, 1 + 2)):
        model = compressed(CASES[kind], specs=specs)
        expected = call(model, CASES[kind])
        fuse(model, cpu=True)
        for _ in range(2):
            counted.clear()
            assert close(call(model, CASES[kind]), expected)
            assert counted.count(rows) == products


def test_a_group_of_which_a_block_has_been_moved_elsewhere_is_no_group() -> None:
    """As offloading moves blocks: the others must not fail for it."""
    model = fuse(compressed(CASES["pixart"]), cpu=True)
    blocks = [block.forward.__self__ for block in model.transformer_blocks]
    assert blocks[0].together.ready()
    model.transformer_blocks[2].to("meta")
    assert not blocks[0].together.ready()
    text = torch.randn(2, 6, 64)
    k, v = blocks[0].keys_and_values(text)
    own = model.transformer_blocks[0].attn2
    assert close(k, own.to_k(text).flatten(0, 1))
    assert close(v, own.to_v(text).flatten(0, 1))


def test_the_text_of_another_call_is_never_used() -> None:
    model = compressed(CASES["pixart"])
    expected = [call(model, CASES["pixart"], seed) for seed in (2, 3)]
    fuse(model, cpu=True)
    assert all(close(call(model, CASES["pixart"], seed), expected[seed - 2]) for seed in (2, 3, 2))
    stop = model.transformer_blocks[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a call that ends within a group
        call(model, CASES["pixart"], 2)
    stop.remove()
    assert close(call(model, CASES["pixart"], 3), expected[1])


def test_the_modulation_of_another_call_is_never_used() -> None:
    case = CASES["dit"]
    model = fuse(compressed(case), cpu=True)
    first = call(model, case)
    with pytest.raises(RuntimeError):
        call(model, Case(case.kind, case.config, {"hidden_states": (3, 8, 8)}, case.extra))
    assert torch.equal(call(model, case), first)
    assert not torch.equal(
        call(model, Case(case.kind, case.config, case.shapes, {"class_labels": torch.tensor([7, 8])})), first
    )


def test_integer_forms_of_weights_and_tokens_are_fused() -> None:
    for short_name in FUSED:
        model = compressed(CASES["dit"], short_name)
        found = report(model, find_family(model).block_names(model))
        assert found == {"BasicTransformerBlock": "3 fused"}, short_name


def test_the_report_gives_the_reason() -> None:
    for short_name, reason in NOT_FUSED.items():
        model = compressed(CASES["dit"], short_name)
        found = report(model, find_family(model).block_names(model))
        assert found == {"BasicTransformerBlock": f"3 not fused ({reason})"}, short_name


@pytest.mark.parametrize("short_name", ["wfp4-ae2m1tok-h16", "wvq2-a8tok", "w4g16-a8tok-h16-r8"])
def test_layers_of_one_stage_are_one_product(case: Case, short_name: str) -> None:
    """Also where each has a codebook of its own."""
    model = fuse(compressed(case, short_name), cpu=True)
    blocks = [m.forward.__self__ for m in model.modules() if "forward" in m.__dict__]
    assert blocks
    # keys and values of a text are those of several blocks
    assert all(len(stage.parts or block.together.parts) == 1 for block in blocks for stage in block.stages)


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_branches_are_held_once_and_part_of_their_stages(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed(CASES[kind], "w4g16-a8tok-s-h16-r8")
    expected, before, alone = call(model, CASES[kind]), storage_bytes(model), list[int]()
    fuse(model, cpu=True)
    run = linear.run_layer
    monkeypatch.setattr(
        linear, "run_layer", lambda x, t, spec, bias: (alone.append(spec.rank), run(x, t, spec, bias))[1]
    )
    assert close(call(model, CASES[kind]), expected)
    assert not any(alone)
    assert storage_bytes(model) <= before


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_a_lora_in_the_branch_of_a_layer_stays_fused(kind: str) -> None:
    """Ranks that differ make another product of the same stage."""
    model = compressed(CASES[kind], "w4g16-a8tok-s-h16-r8")
    fuse(model, cpu=True)
    before = call(model, CASES[kind])
    for name, layer in linear_layers(model).items():
        if not name.endswith(("0.attn1.to_q", "0.attn.to_k", "0.proj_out", "0.ff.net.2")):
            continue
        assert isinstance(layer, CompressedLinear)
        a, b = torch.randn(4, layer.in_features) / 8, torch.randn(layer.out_features, 4) / 8
        tensors, spec = join_adapter(layer.tensors(), layer.spec, a, b)
        wider = CompressedLinear(layer.in_features, layer.out_features, spec, layer.bias is not None)
        wider.load_tensors(tensors, layer.bias)
        model.set_submodule(name, wider)
    expected = call(unfuse(model), CASES[kind])
    assert not close(before, expected)
    assert close(call(fuse(model, cpu=True), CASES[kind]), expected)
    assert "not fused" not in str(report(model, find_family(model).block_names(model)))
    stages = [s for m in model.modules() if "forward" in m.__dict__ for s in m.forward.__self__.stages]
    assert {len(stage.parts) for stage in stages} == ({1, 2} if kind == "dit" else {1, 3})


def test_layers_with_other_tables_are_not_joined() -> None:
    model = compressed(CASES["dit"], "wfp4-ae2m1tok-h16")
    model.transformer_blocks[0].attn1.to_k._buffers["weight_codebook"] //= 2
    expected = call(model, CASES["dit"])
    assert close(call(fuse(model, cpu=True), CASES["dit"]), expected)


def test_activations_of_one_stage_may_differ() -> None:
    model = compressed(CASES["dit"], "wfp4-ae2m1tok", {"to_k": "wfp4-a8tok", "net.2": "wfp4-ae2m1g16"})
    expected = call(model, CASES["dit"])
    assert "partly fused" in report(model, ["transformer_blocks.0"])["BasicTransformerBlock"]
    assert close(call(fuse(model, cpu=True), CASES["dit"]), expected)


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_rotated_modulation_layers_of_several_formats_are_computed_at_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[kind]
    specs = {"1.norm1.linear": "w4g16-h16", "linear": "w8-h16"}
    expected = call(compressed(case, specs=specs), case)
    products, rotations = [], []
    product, rotating = Modulation._product, modulation.rotate
    monkeypatch.setattr(Modulation, "_product", lambda *args: (products.append(1), product(*args))[1])
    monkeypatch.setattr(modulation, "rotate", lambda *args: (rotations.append(1), rotating(*args))[1])
    assert close(call(fuse(compressed(case, specs=specs), cpu=True), case), expected)
    assert len(products) == len(rotations) > 0


def test_modulation_layers_of_unlike_rotations_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case, specs = CASES["flux"], {"1.norm1.linear": "w8", "linear": "w8-h16"}
    expected = call(compressed(case, specs=specs), case)
    products, product = [], Modulation._product
    monkeypatch.setattr(Modulation, "_product", lambda *args: (products.append(1), product(*args))[1])
    assert close(call(fuse(compressed(case, specs=specs), cpu=True), case), expected)
    assert products


def test_modulation_layers_whose_signs_differ_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed(CASES["flux"], specs={"linear": "w8-h16"})
    buffers = model.transformer_blocks[1].norm1.linear._buffers
    buffers["hadamard_signs"] = -buffers["hadamard_signs"]
    expected = call(model, CASES["flux"])
    monkeypatch.setattr(Modulation, "_product", lambda *args: pytest.fail("they were joined"))
    assert close(call(fuse(model, cpu=True), CASES["flux"]), expected)


class Counted(TorchDispatchMode):
    """Counts the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "vdit_quant":
            self.calls[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def counted(model: nn.Module, case: Case) -> dict[str, int]:
    """Op -> its calls in one forward, but for attention and what makes the modulation."""
    with Counted() as mode:
        call(model, case)
    return {
        name: n for name, n in mode.calls.items() if name not in ("attention", "head_norm_rope", "int8_weight_linear")
    }


def test_an_fp8_block_adds_its_attention_in_the_norm_behind_it() -> None:
    case = CASES["dit"]
    assert counted(compressed(case, "wf8-af8tok"), case) == {"quant_token_fp8": 3 * 6, "fp8_linear": 3 * 6}
    block = {"norm_quant_fp8": 1, "fp8_linear": 4, "act_quant": 2, "gate_norm_quant_fp8": 1, "gate_add": 1}
    assert counted(fuse(compressed(case, "wf8-af8tok"), cpu=True), case) == {name: 3 * n for name, n in block.items()}
    told = fused_ops(compressed(case, "wf8-af8tok").to("meta"))  # for `inspect`
    assert {op for steps in told.values() for step in steps for op in step} == block.keys()


@pytest.mark.parametrize(
    ("specs", "ops"),
    [
        ({"proj": "w8-a8tok"}, {"gate_norm_quant": 3, "int8_linear": 3, "gate_add": 3}),
        ({"proj": "w8-ae2m1tok"}, {"norm_quant_fp4": 3, "gate_add": 6}),
        ({"to_out.0": "w8-a8tok"}, {"int8_linear_add": 3, "norm_quant_fp8": 6}),
        ({"to_out.0": "w8"}, {"gate_norm_quant_fp8": 3, "gate_add": 3}),
        ({"proj": "w8"}, {"norm_quant_fp8": 3, "gate_add": 6}),
    ],
)
def test_what_an_fp8_stage_adds_is_added_by_whatever_reads_it(specs: dict[str, str], ops: dict[str, int]) -> None:
    model = compressed(CASES["dit"], "wf8-af8tok", specs)
    expected = call(model, CASES["dit"])
    fuse(model, cpu=True)
    assert counted(model, CASES["dit"]).items() >= ops.items()
    assert close(call(model, CASES["dit"]), expected)


@pytest.mark.parametrize("short_name", ["w8-a8tok", "wf8-af8tok"])
@pytest.mark.parametrize("kind", ["dit", "flux"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpus(1))])
@torch.no_grad()
def test_in_bfloat16_fused_is_unfused_to_twice_the_error_of_the_plain_model(
    device: str, kind: str, short_name: str
) -> None:
    case = CASES[kind]
    inputs = {name: torch.bfloat16 for name in case.shapes}
    plain = build(case).to(device, torch.bfloat16)
    exact = call(copy.deepcopy(plain).float(), case)
    own = (call(plain, case, dtypes=inputs) - exact).norm() / exact.norm()
    model = compress(plain, short_name)
    expected = call(model, case, dtypes=inputs)
    found = call(fuse(model, cpu=True), case, dtypes=inputs)
    assert found.dtype == expected.dtype
    assert (found - expected).norm() / expected.norm() < 2 * own


def test_the_fp8_codes_of_a_sample_do_not_depend_on_its_batch() -> None:
    block = fuse(compressed(CASES["dit"], "wf8-af8tok"), cpu=True).transformer_blocks[0].forward.__self__
    x, branch = torch.randn(2, 4 * 5, 64) * torch.logspace(-3, 3, 4).repeat_interleave(5)[:, None]
    mods = torch.randn(3, 4, 64)

    def rows(sample: slice) -> list[stage.Rows]:
        tokens = slice(5 * sample.start, 5 * sample.stop)
        gate, *mod = (m[sample] for m in mods)
        summed = block.up.norm_sum(stage.Sum(x[tokens], branch[tokens], gate), block.norm2, *mod)[1]
        return [block.qkv.norm(x[tokens], block.norm1, *mod), summed, block.out.act(x[tokens])]

    together = rows(slice(0, 4))
    for i in range(4):
        for alone, among in zip(rows(slice(i, i + 1)), together, strict=True):
            assert alone.values.dtype == torch.float8_e4m3fn
            assert torch.equal(alone.values.float(), among.values[5 * i : 5 * i + 5].float())
            assert torch.equal(alone.scale, among.scale[5 * i : 5 * i + 5])


def test_a_gpu_without_fp8_runs_such_layers_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    reason = "fp8 needs compute capability 8.9"
    skeleton = compressed(CASES["dit"], "wf8-af8tok").to("meta")
    found = report(skeleton, find_family(skeleton).block_names(skeleton))
    assert found == {"BasicTransformerBlock": f"3 not fused ({reason})"}
    assert fused_blocks(fuse(skeleton)) == 0
    integers = compressed(CASES["dit"], "w8-a8tok").to("meta")
    assert report(integers, ["transformer_blocks.0"]) == {"BasicTransformerBlock": "1 fused"}


def test_the_report_names_what_is_not_fused() -> None:
    model = build(CASES["dit"])
    blocks = find_family(model).block_names(model)
    assert "not compressed" in report(model, blocks)["BasicTransformerBlock"]
    assert report(compress(model), blocks) == {"BasicTransformerBlock": "3 fused"}
    other = build(CASES["dit"])
    assert "partly fused" in report(compress(other, specs={"to_out.0": "w8"}), blocks)["BasicTransformerBlock"]


@torch.no_grad()
def test_a_block_that_runs_its_own_forward_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "_process", dispatch._Process(dispatch.Settings(strict=True)))
    case = CASES["dit"]
    model = fuse(compressed(case), cpu=True)
    call(model, case)
    assert dispatch.fallbacks() == {}
    handle = model.transformer_blocks[1].attn1.register_forward_hook(lambda *_: None)
    for _ in range(2):
        call(model, case)
    handle.remove()
    call(model.train(), case)
    model.eval().transformer_blocks[0](torch.randn(2, 4, 64), torch.zeros(2, 1, 4), timestep=torch.tensor([1, 1]),
                                       class_labels=torch.tensor([1, 2]))  # fmt: skip
    call(model, case)
    own = "BasicTransformerBlock runs its own forward, not the fused one: "
    hook = "a hook, or another module, forward, attention processor or back-end, was put inside it"
    unknown = "an argument that its fused forward does not know"
    assert [record.getMessage() for record in caplog.records] == [own + r for r in (hook, "training mode", unknown)]
    assert dispatch.fallbacks() == {"BasicTransformerBlock": {hook, "training mode", unknown}}


@torch.no_grad()
def test_on_a_cpu_no_block_says_that_it_runs_its_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    call(fuse(compressed(CASES["dit"])), CASES["dit"])
    assert caplog.records == []


def test_a_model_with_no_fusion_runs_as_it_is() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    expected = plain(x)
    assert torch.equal(fuse(plain, cpu=True)(x), expected)
    assert fused_blocks(plain) == 0


class BasicTransformerBlock(nn.Module):
    """As in repositories that diffusers took it from."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_q = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_q(self.norm(x))


@torch.no_grad()
def test_a_class_of_ones_own_with_the_name_of_a_known_one_runs_as_it_is() -> None:
    model = nn.Sequential(BasicTransformerBlock(), BasicTransformerBlock())
    x = torch.randn(1, 4, 64)
    expected = model(x)
    assert torch.equal(fuse(model, cpu=True)(x), expected)
    assert fused_blocks(model) == 0
    assert report(model, ["0", "1"]) == {"BasicTransformerBlock": "2 not fused (no fusion knows this class)"}


def test_a_class_made_of_a_known_one_is_fused_under_its_name() -> None:
    model = compressed(CASES["dit"])
    known = type(model.transformer_blocks[0])
    for block in model.transformer_blocks:
        block.__class__ = type(known.__name__, (known,), {})
    assert fused_blocks(fuse(model, cpu=True)) == len(model.transformer_blocks)
