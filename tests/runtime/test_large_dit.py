"""Large-DiT: its published names, its arithmetic, and TerDiT's checkpoints of it from conversion to pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vdit_quant
from vdit_quant.evaluate.sampling import Workload
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.spec import FormatSpec
from vdit_quant.runtime.describe import describe_artifact
from vdit_quant.runtime.models.large_dit import LargeDiT, find_config, rotate, rotations
from vdit_quant.runtime.source import find_source
from vdit_quant.runtime.terdit import import_terdit

HEADS = 2
SMALL = {"num_layers": 2, "num_attention_heads": HEADS, "attention_head_dim": 16, "ff_inner_dim": 64, "sample_size": 8}
TERNARY = (
    "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
    "feed_forward.w3", "adaLN_modulation.1",
)  # fmt: skip
# what a checkpoint of the paper holds beside its ternary layers
PLAIN = {
    "x_embedder": ("weight", "bias"),
    "t_embedder.mlp.0": ("weight", "bias"),
    "t_embedder.mlp.2": ("weight", "bias"),
    "y_embedder.embedding_table": ("weight",),
    "final_layer.linear": ("weight", "bias"),
    "final_layer.adaLN_modulation.1": ("weight", "bias"),
    **{f"layers.{i}.{norm}": ("weight",) for i in range(2) for norm in ("attention_norm", "ffn_norm")},
    **{f"layers.{i}.adaLN_modulation.2": ("weight",) for i in range(2)},
}


@pytest.fixture
def model() -> LargeDiT:
    """A small one whose ternary layers are on their grids; nothing is zero, so that every part is seen."""
    torch.manual_seed(0)
    made = LargeDiT(**SMALL).eval()
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    for name in ternary():
        weight = made.get_submodule(name).weight
        weight.data = torch.randint(-1, 2, weight.shape).float() * (0.1 if "w1" in name else -0.1)
    return made


def ternary() -> list[str]:
    return [f"layers.{i}.{name}" for i in range(2) for name in TERNARY]


@pytest.fixture
def write(model: LargeDiT, tmp_path: Path) -> Callable[..., Path]:
    """Writes the model in the published layout, some tensors replaced or (None) left out."""

    def make(**changed: Tensor | None) -> Path:
        tensors: dict[str, Tensor | None] = dict(model.state_dict())
        for name in ternary():
            alpha = 0.1 if "w1" in name else -0.1
            codes = (model.get_submodule(name).weight.detach() / alpha).round().to(torch.uint8) + 1  # 255 wraps to 0
            quarters = codes.chunk(4)
            tensors[f"{name}.weight"] = sum(part << shift for part, shift in zip(quarters, (6, 4, 2, 0), strict=True))
            tensors[f"{name}.alphas"] = torch.tensor([alpha])
        tensors |= {name.replace("__", "."): t for name, t in changed.items()}
        save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, tmp_path / "ema.safetensors")
        return tmp_path / "ema.safetensors"

    return make


def call(batch: int = 2, size: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(1)
    latents = torch.randn(batch, 4, size, size)
    return {"hidden_states": latents, "timestep": torch.full((batch,), 500), "class_labels": torch.arange(batch) + 999}


def test_its_parameters_have_the_published_names(model: LargeDiT) -> None:
    layers = [f"{name}.weight" for name in ternary()] + [f"layers.{i}.adaLN_modulation.1.bias" for i in range(2)]
    plain = [f"{name}.{key}" for name, keys in PLAIN.items() for key in keys]
    assert sorted(model.state_dict()) == sorted(layers + plain)


def test_queries_and_keys_meet_by_their_distance_alone() -> None:
    turns = rotations(12, 16, torch.device("cpu"))
    q, k = (torch.randn(16).expand(1, 12, 1, 16) for _ in range(2))
    met = torch.einsum("bqhd,bkhd->qk", rotate(q, turns), rotate(k, turns))
    for distance in (0, 1, 5):
        along = met.diagonal(distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
    assert not torch.allclose(met[0, 1], met[0, 5], atol=1e-2)
    assert torch.equal(rotate(q, turns)[:, 0], q[:, 0])


@torch.no_grad()
def test_patches_are_cut_and_joined_as_published(model: LargeDiT) -> None:
    """Without blocks, what goes in at a pixel's place in the embedder comes out at its place of the last layer."""
    model.layers = torch.nn.ModuleList()
    for layer in (model.x_embedder, model.final_layer.linear, model.final_layer.adaLN_modulation[1]):
        layer.weight.zero_()
        layer.bias.zero_()
    channel, row, column = 2, 1, 0
    model.x_embedder.weight[0, channel * 4 + row * 2 + column] = 1  # channels, then rows, then columns
    model.final_layer.norm_final = torch.nn.Identity()
    model.final_layer.linear.weight[(row * 2 + column) * 8 + 5, 0] = 1  # rows, columns, then channels
    inputs = call()
    out = model(**inputs).sample
    want = torch.zeros(2, 8, 8, 8)
    want[:, 5, row::2, column::2] = inputs["hidden_states"][:, channel, row::2, column::2]
    assert torch.equal(out, want)


@torch.no_grad()
@pytest.mark.parametrize("activation", [None, FormatSpec("int8")])
def test_a_checkpoint_is_loaded_without_a_class_from_the_user(
    activation: FormatSpec | None, write, model: LargeDiT, tmp_path: Path
) -> None:
    import_terdit(write(), tmp_path / "out", activation, heads=HEADS, sample_size=8)
    loaded = vdit_quant.load(tmp_path / "out", device="cpu")
    assert type(loaded) is LargeDiT
    assert loaded.config.out_channels == 8
    got, want = (m(**call(), return_dict=False)[0] for m in (loaded, model))
    assert float((got - want).norm() / want.norm()) < (1e-5 if activation is None else 0.05)
    assert loaded(**call(1, 4)).sample.shape == (1, 8, 4, 4)


def test_inspect_shows_its_true_bytes(write, tmp_path: Path) -> None:
    import_terdit(write(), tmp_path / "out", FormatSpec("int8"), heads=HEADS, sample_size=8)
    found = describe_artifact(tmp_path / "out", "cuda")
    rows = {row["pattern"]: row for row in found["layers"]}
    assert found["class"] == "LargeDiT"
    assert sorted(rows) == sorted(f"layers.*.{name}" for name in TERNARY)
    assert rows["layers.*.feed_forward.w1"]["bytes"] == 2 * (64 * 32 // 4 + 64 * 4)
    size = (tmp_path / "out" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert found["compressed_bytes"] + found["other_bytes"] == size


def test_diffusers_pipeline_for_dit_samples_with_it(write, tmp_path: Path) -> None:
    import_terdit(write(), tmp_path / "out", heads=HEADS, sample_size=8)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=32, latent_channels=4)
    pipe = diffusers.DiTPipeline(vdit_quant.load(tmp_path / "out", device="cpu"), vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    assert torch.isfinite(images).all()


def test_compare_measures_it_against_the_floats(write, model: LargeDiT, tmp_path: Path) -> None:
    import_terdit(write(), tmp_path / "out", heads=HEADS, sample_size=8)
    model.save_pretrained(tmp_path / "floats")
    found = vdit_quant.compare(tmp_path / "out", tmp_path / "floats", Workload(samples=2, steps=2), device="cpu")
    assert found.psnr > 80, "the weights are the same"


def test_another_architecture_stays_without_a_class(write, tmp_path: Path) -> None:
    for number, changed in enumerate(({"x_embedder__bias": None}, {"extra": torch.ones(2)})):
        import_terdit(write(**changed), tmp_path / f"{number}", heads=HEADS)
        assert "_class_name" not in json.loads((tmp_path / f"{number}" / "config.json").read_text())
        with pytest.raises(InputError, match="no _class_name"):
            find_source(tmp_path / f"{number}").skeleton()
    shapes = {name: tuple(t.shape) for name, t in LargeDiT(**SMALL).state_dict().items()}
    assert find_config(shapes, HEADS, 8) is not None
    assert find_config(shapes, 3, 8) is None
    assert find_config(shapes, 32, 8) is None, "heads of one channel cannot be rotated"


@pytest.mark.parametrize("change", [{"num_kv_heads": 1}, {"qk_norm": True}, {"modulation_norm": False}])
def test_every_variant_is_told_by_its_shapes(change: dict[str, object]) -> None:
    model = LargeDiT(**SMALL, **change)
    found = find_config({name: tuple(t.shape) for name, t in model.state_dict().items()}, HEADS, 8)
    assert found is not None
    assert {key: found[key] for key in change} == change
    assert found["_class_name"] == "LargeDiT"
    assert model.eval()(**call()).sample.shape == (2, 8, 8, 8)
