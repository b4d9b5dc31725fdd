"""Every family on random models of its class: complete roles, blocks, exact folds, guidance branches."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from vdit_quant.calibrate.replay import BlockChain
from vdit_quant.evaluate import offload
from vdit_quant.quantize import registry
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime import families
from vdit_quant.runtime.attach import linear_layers
from vdit_quant.runtime.family import Fold, block_of, find_family
from vdit_quant.runtime.models import large_dit
from vdit_quant.runtime.step import StepTracker

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
IMAGE = {"hidden_states": (4, 8, 8), "encoder_hidden_states": (3, 24)}
POOLED = {"pooled_projections": (16,)}
SD3 = {
    **HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 24,
    "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
}  # fmt: skip
WAN = {
    **HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48, "num_layers": 2,
    "rope_max_seq_len": 32,
}  # fmt: skip
VIDEO = {"hidden_states": (4, 2, 8, 8), "encoder_hidden_states": (3, 24)}
# name -> class, its arguments, shape of each of its inputs for one sample, folds a model has, what else a call needs
CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]], int, dict[str, Any]]] = {
    "dit": (
        "DiTTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 1000},
        {"hidden_states": (4, 8, 8)},
        2 * 3,
        {"class_labels": torch.tensor([3, 5, 1000, 1000])},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 32, "sample_size": 8,
         "caption_channels": 24},
        IMAGE,
        2 * 2,
        {},
    ),
    "sd3": ("SD3Transformer2DModel", SD3, {**IMAGE, **POOLED}, 2 * 4 + 3, {}),
    "sd35": (
        "SD3Transformer2DModel",
        {**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        {**IMAGE, **POOLED},
        2 * (4 + 2) + 3,
        {},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24,
         "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)},
        {"hidden_states": (16, 4), "encoder_hidden_states": (3, 24), **POOLED},
        2 * 4 + 2,
        {"img_ids": torch.randint(4, (16, 3)), "txt_ids": torch.zeros(3, 3)},
    ),
    "large_dit": (
        "LargeDiT",
        {**HEADS, "num_layers": 2, "sample_size": 8, "ff_inner_dim": 48, "num_kv_heads": 1, "qk_norm": True},
        {"hidden_states": (4, 8, 8)},
        0,
        {"class_labels": torch.tensor([3, 5, 1000, 1000])},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "time_embed_dim": 24, "text_embed_dim": 24,
         "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 3},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (3, 24)},
        2,
        {},
    ),
    "wan": ("WanTransformer3DModel", WAN, VIDEO, 2 * 2, {}),
    "wan-i2v": (
        "WanTransformer3DModel",
        {**WAN, "image_dim": 20, "added_kv_proj_dim": 32},
        {**VIDEO, "encoder_hidden_states": (512, 24), "encoder_hidden_states_image": (5, 20)},
        2,
        {},
    ),
}  # fmt: skip
OUTSIDE = {"embedder", "output"}
TRAPS = {  # layers that a careless pattern takes for embedders or for the model's output
    "single_transformer_blocks.0.proj_out": "feed_forward",
    "single_transformer_blocks.1.norm.linear": "modulation",
    "transformer_blocks.2.norm1_context.linear": "modulation",
    "transformer_blocks.1.norm1.linear": "modulation",
    "blocks.1.attn2.add_v_proj": "attention",
    "layers.1.adaLN_modulation.1": "modulation",
    "final_layer.adaLN_modulation.1": "output",
    "proj_out": "output",
    "norm_out.linear": "output",
}
DEAD = {"transformer_blocks.2.attn.add_q_proj"}  # SD3's last block throws its text queries away


def _build(name: str) -> nn.Module:
    kind, arguments, _, _, _ = CASES[name]
    torch.manual_seed(1)
    model = getattr(diffusers, kind, large_dit.LargeDiT)(**arguments)
    with torch.no_grad():  # nothing may start at zero, or parts of a block would not be seen
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.double().eval()


def _inputs(name: str, batch: int = 4) -> dict[str, Any]:
    _, _, shapes, _, extra = CASES[name]
    torch.manual_seed(2)
    tensors = {key: torch.randn(batch, *shape, dtype=torch.float64) for key, shape in shapes.items()}
    return {**tensors, "timestep": torch.full((batch,), 0.5 if "flux" in name else 500.0), **extra}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, _build(request.param)


def _output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def _apply(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Folds `scale` into the model in place, from the definition."""
    producer: Any = model.get_submodule(fold.producer)
    rows = list(fold.rows)
    producer.weight[rows] *= scale[:, None]
    producer.bias[rows] *= scale
    if fold.plus_one is not None:
        ones = list(fold.plus_one)
        producer.weight[ones] *= scale[:, None]
        producer.bias[ones] = (producer.bias[ones] + 1) * scale - 1
    for name in fold.consumers:
        model.get_submodule(name).weight.data /= scale


def test_every_family_has_a_case_here() -> None:
    served = {find_family(_build(name)).name for name in CASES}
    assert served == set(registry.names(families)) - {"generic"}


def test_every_layer_of_a_block_has_a_role_and_every_other_is_known(case: tuple[str, nn.Module]) -> None:
    _, model = case
    family = find_family(model)
    roles, blocks = family.linears(model), family.block_names(model)
    assert list(roles) == list(linear_layers(model))
    for name, role in roles.items():
        inside = block_of(name, blocks) is not None and ".emb." not in name
        assert role in ({"attention", "feed_forward", "modulation"} if inside else OUTSIDE), f"{name}: {role}"
    assert {name: roles[name] for name in TRAPS if name in roles} == {n: r for n, r in TRAPS.items() if n in roles}


def test_the_blocks_are_all_of_the_models_repeated_parts(case: tuple[str, nn.Module]) -> None:
    name, model = case
    arguments = CASES[name][1]
    blocks = find_family(model).block_names(model)
    assert len(blocks) == arguments["num_layers"] + arguments.get("num_single_layers", 0)
    for block in blocks:
        assert linear_layers(model.get_submodule(block))


@torch.no_grad()
def test_every_fold_leaves_the_model_as_it_was(case: tuple[str, nn.Module]) -> None:
    name, model = case
    inputs, generator = _inputs(name), torch.Generator().manual_seed(3)
    want = _output(model, inputs)
    folds = find_family(model).folds(model)
    assert len(folds) == CASES[name][3]
    together = copy.deepcopy(model)
    for fold in folds:
        scale = torch.exp(torch.randn(len(fold.rows), generator=generator, dtype=torch.float64))
        alone = copy.deepcopy(model)
        _apply(alone, fold, scale)
        _apply(together, fold, scale)
        assert _error(_output(alone, inputs), want) < 1e-6, fold
        for reader in set(fold.consumers) - DEAD:  # and every one of its parts is needed
            broken = copy.deepcopy(alone)
            broken.get_submodule(reader).weight.data *= scale
            assert _error(_output(broken, inputs), want) > 1e-5, (fold, reader)
    assert _error(_output(together, inputs), want) < 1e-6


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_folds_stay_inside_a_block_and_take_whole_inputs(case: tuple[str, nn.Module]) -> None:
    _, model = case
    family = find_family(model)
    blocks, layers = family.block_names(model), linear_layers(model)
    read = []
    for fold in family.folds(model):
        assert len({block_of(name, blocks) for name in (fold.producer, *fold.consumers)}) == 1
        assert {layers[name].in_features for name in fold.consumers} == {len(fold.rows)}
        assert fold.plus_one is None or len(fold.plus_one) == len(fold.rows)
        assert max(fold.rows[-1], (fold.plus_one or fold.rows)[-1]) < layers[fold.producer].out_features
        read += fold.consumers
    assert len(read) == len(set(read)), "a layer's input scale is folded once"


@torch.no_grad()
def test_a_doubled_batch_is_unconditional_first_as_pipelines_build_it(case: tuple[str, nn.Module]) -> None:
    name, model = case
    inputs = _inputs(name)
    with StepTracker(model, find_family(model)) as tracker:
        model(**inputs)
        by_label = name in ("dit", "large_dit")
        assert tracker.branches.tolist() == ([0, 0, 1, 1] if by_label else [0, 0, 0, 0])
        model(**inputs)  # the same timestep again: the pipeline's second call of this step
        assert tracker.branches.tolist() == ([0, 0, 1, 1] if by_label else [1, 1, 1, 1])
        inputs["hidden_states"] = inputs["hidden_states"][:2].repeat(2, *[1] * len(CASES[name][2]["hidden_states"]))
        model(**{**inputs, "timestep": inputs["timestep"] / 2})
        assert tracker.branches.tolist() == ([0, 0, 1, 1] if by_label else [1, 1, 0, 0])


def test_a_family_says_what_its_model_must_be_given(case: tuple[str, nn.Module]) -> None:
    name, model = case
    family, inputs = find_family(model), _inputs(name)
    for key, shape in family.condition_shapes(model).items():
        # of what the model takes once for all samples, a file of conditions has a row for each
        given = tuple(inputs[key].shape[0 if key in family.shared else 1 :])
        assert len(given) == len(shape)
        assert all(size in (None, found) for size, found in zip(shape, given, strict=True)), key


def test_a_model_that_gets_its_positions_from_the_pipeline_is_not_sampled_without_it() -> None:
    kind, arguments, _, _, _ = CASES["cogvideox"]
    model = getattr(diffusers, kind)(**arguments, use_rotary_positional_embeddings=True)
    with pytest.raises(InputError, match="name the pipeline's folder"):
        find_family(model).condition_shapes(model)


def test_the_image_families_know_their_latents(case: tuple[str, nn.Module]) -> None:
    name, model = case
    shape: Callable[[nn.Module], tuple[int, ...]] = find_family(model).latent_shape
    if name.startswith(("wan", "flux")):  # how long and how large is up to the caller
        with pytest.raises(NotImplementedError):
            shape(model)
    else:
        assert shape(model) == CASES[name][2]["hidden_states"]


def test_the_blocks_of_every_family_can_be_run_one_by_one(case: tuple[str, nn.Module], tmp_path: Path) -> None:
    name, model = case
    blocks = find_family(model).block_names(model)
    tracker, seen = StepTracker(model, find_family(model)), list[Any]()
    with tracker, BlockChain(model, blocks, tracker, tmp_path) as chain:
        model.get_submodule(blocks[-1]).register_forward_hook(lambda module, args, output: seen.append(output))
        for _ in range(2):
            _output(model, _inputs(name))
        chain.stop()
        for number in range(len(blocks)):
            chain.run(number, torch.device("cpu"), lambda place: None)
    assert len(seen) == 4, "two calls of the model, then two of the last block alone"
    for in_the_model, alone in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(*(out if isinstance(out, Tensor) else out[-1] for out in (in_the_model, alone)))


def test_a_model_whose_blocks_are_streamed_reads_no_weight_that_is_not_on_the_device(
    case: tuple[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not on the device are NaN here: whatever reads one shows it."""
    name, model = case
    want, blocks = _output(model, _inputs(name)), find_family(model).block_names(model)
    inside = [t for block in blocks for t in model.get_submodule(block).parameters()]
    fetched = {id(t): t.data for t in inside}
    for tensor in inside:
        tensor.data = torch.full_like(tensor, float("nan"))

    def place(tensors: Any, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        homes = [(tensor, tensor.data) for tensor in tensors]
        for tensor, home in homes:
            tensor.data = fetched.get(id(tensor), home)
        return homes

    monkeypatch.setattr(offload, "_place", place)
    with offload.BlockStream(model, blocks, torch.device("cpu")):
        assert torch.equal(_output(model, _inputs(name)), want)
    assert all(tensor.isnan().all() for tensor in inside), "every block is dropped again"
