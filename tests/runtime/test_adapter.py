"""A LoRA adapter joined to an artifact: what the layers compute, every layout, and what cannot be joined."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vdit_quant
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.adapter import METADATA, read_adapter
from vdit_quant.runtime.artifact import read_config
from vdit_quant.runtime.describe import describe_artifact
from vdit_quant.runtime.linear import CompressedLinear

LAYERS = {
    "transformer_blocks.0.attn1.to_q": (64, 64),
    "transformer_blocks.1.attn1.to_q": (64, 64),
    "transformer_blocks.1.ff.net.2": (64, 256),
    "proj_out_2": (16, 64),  # not compressed
}
RANK, OUT = 4, "proj_out_1__"
OTHER = "transformer_blocks.0.attn1.to_q"  # of the demo, 128 wide


def factors(sizes: dict[str, tuple[int, int]] = LAYERS, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """down [r, K] and up [N, r] of every layer, in numbers that bfloat16 holds."""
    torch.manual_seed(1)
    made = {name: (torch.randn(rank, k), torch.randn(n, rank) / 8) for name, (n, k) in sizes.items()}
    return {name: (down.bfloat16().float(), up.bfloat16().float()) for name, (down, up) in made.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter under the names of a layout."""

    def make(
        prefix: str = "transformer.", down: str = ".lora_A.weight", up: str = ".lora_B.weight",
        settings: dict[str, Any] | None = None, **more: Tensor,
    ) -> Path:  # fmt: skip
        tensors = {name.replace("__", "."): t for name, t in more.items()}
        for name, (a, b) in factors().items():
            tensors |= {f"{prefix}{name}{down}": a, f"{prefix}{name}{up}": b}
        metadata = {METADATA: json.dumps(settings)} if settings else None
        save_file(tensors, tmp_path / "lora.safetensors", metadata=metadata)
        return tmp_path / "lora.safetensors"

    return make


def adapted(model: nn.Module, scale: float) -> nn.Module:
    """The model with the adapter beside its layers, from the definition."""
    for name, (down, up) in factors().items():
        model.get_submodule(name).register_forward_hook(
            lambda _, args, y, down=down, up=up: y + scale * (args[0] @ down.T) @ up.T
        )
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "own"),
    [
        ({}, 1.0),
        ({"prefix": "", "down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}, 1.0),
        ({"prefix": "base_model.model.", "settings": {"lora_alpha": 8, "r": RANK}}, 2.0),
        ({"settings": {"transformer.lora_alpha": 8, "transformer.use_rslora": True}}, 4.0),
        ({"down": ".lora.down.weight", "up": ".lora.up.weight"}, 1.0),
    ],
)
def test_a_joined_artifact_computes_both(
    layout: dict[str, Any], own: float, write, tiny_artifact: Path, dit_inputs: Callable[..., Any], tmp_path: Path
) -> None:
    ranks = vdit_quant.join_lora(tiny_artifact, write(**layout), tmp_path / "out", scale=0.5)
    assert ranks == dict.fromkeys(LAYERS, RANK)
    model = vdit_quant.load(tmp_path / "out", device="cpu")
    plain = vdit_quant.load(tiny_artifact, device="cpu")
    inputs = dit_inputs(model)
    before, want = plain(**inputs).sample, adapted(plain, 0.5 * own)(**inputs).sample
    got = model(**inputs).sample
    assert float((got - want).norm() / want.norm()) < 5e-3  # 16-bit factors: a few codes of the next layers flip
    assert float((before - want).norm() / want.norm()) > 0.1, "the adapter does something"


def test_only_adapted_layers_change_and_the_record_says_what_was_joined(
    write, tiny_artifact: Path, tmp_path: Path
) -> None:
    vdit_quant.join_lora(tiny_artifact, write(), tmp_path / "out", scale=0.5)
    old, new = (vdit_quant.load(folder, device="cpu") for folder in (tiny_artifact, tmp_path / "out"))
    for name, layer in new.named_modules():
        if isinstance(layer, CompressedLinear):
            before = old.get_submodule(name)
            assert layer.spec.rank == (RANK if name in LAYERS else 0)
            for key, tensor in before.tensors().items():
                assert torch.equal(layer.tensors()[key], tensor), (name, key)
    assert read_config(tmp_path / "out").provenance["adapters"] == [{"file": "lora.safetensors", "scale": 0.5}]
    rows = {row["spec"] for row in describe_artifact(tmp_path / "out", "cpu")["layers"]}
    assert any(spec.endswith(f"-r{RANK}") for spec in rows)


@torch.no_grad()
def test_a_second_adapter_joins_the_first(
    write, tiny_artifact: Path, dit_inputs: Callable[..., Any], tmp_path: Path
) -> None:
    vdit_quant.join_lora(tiny_artifact, write(), tmp_path / "one")
    vdit_quant.join_lora(tmp_path / "one", write(), tmp_path / "two", scale=-1.0)
    model, plain = (vdit_quant.load(folder, device="cpu") for folder in (tmp_path / "two", tiny_artifact))
    assert model.transformer_blocks[0].attn1.to_q.spec.rank == 2 * RANK
    got, want = (m(**dit_inputs(plain)).sample for m in (model, plain))
    assert float((got - want).norm() / want.norm()) < 5e-3, "the two cancel"
    assert [one["scale"] for one in read_config(tmp_path / "two").provenance["adapters"]] == [1.0, -1.0]


def test_a_pipeline_stays_one(write, demo_artifact: Callable[..., Path], tmp_path: Path) -> None:
    artifact = demo_artifact()
    layer = "transformer_blocks.0.attn1.to_v"
    n, k = vdit_quant.load(artifact, device="cpu").transformer.get_submodule(layer).weight_scale.shape[0], 128
    file = tmp_path / "small.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.randn(2, k), f"{layer}.lora_B.weight": torch.randn(n, 2)}, file)
    vdit_quant.join_lora(artifact, file, tmp_path / "out")
    pipe = vdit_quant.load(tmp_path / "out", device="cpu")
    assert pipe.transformer.get_submodule(layer).spec.rank == 2
    assert pipe([1], num_inference_steps=1, output_type="np").images.shape[0] == 1


def test_other_layouts_are_converted_by_diffusers(tmp_path: Path) -> None:
    """Kohya's names for FLUX: q, k and v are one layer there, and alpha is a tensor."""
    width, rank = 64, 4
    down, up = torch.randn(rank, width), torch.randn(3 * width, rank)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    model = diffusers.FluxTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, num_layers=1, num_single_layers=1,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    shapes = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = read_adapter(tmp_path / "kohya.safetensors", shapes, "FluxTransformer2DModel")
    assert sorted(found) == [f"transformer_blocks.0.attn.to_{part}" for part in "kqv"]
    for part, rows in zip("qkv", up.chunk(3), strict=True):
        got = found[f"transformer_blocks.0.attn.to_{part}"]
        torch.testing.assert_close(got.scale * got.up @ got.down, 2.0 / rank * rows @ down)


ALPHA = {"transformer.lora_alpha": 2}


@pytest.mark.parametrize(
    ("pattern", "scales"),
    [
        ({"transformer_blocks.0.attn1.to_q": 8}, [2, 0.5, 0.5, 0.5]),
        ({"to_q": 8}, [2, 2, 0.5, 0.5]),
        ({"0.attn1.to_q": 8, "to_q": 16}, [2, 4, 0.5, 0.5]),
        ({r"transformer_blocks\.\d\..*": 8}, [2, 2, 2, 0.5]),
        ({"o_q": 8, "attn1": 8}, [0.5] * 4),  # not whole parts of a name, or not its end
    ],
)
def test_an_alpha_pattern_is_read_as_peft_reads_it(pattern: dict[str, int], scales: list[float], write) -> None:
    found = read_adapter(write(settings={**ALPHA, "transformer.alpha_pattern": pattern}), LAYERS, "DiT")
    assert [found[name].scale for name in LAYERS] == scales


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({"lora_alpha": 16}, 4.0), ({"lora_alpha": 16, "use_rslora": True}, 8.0), ({"alpha_pattern": {"to_q": 2}}, 0.5)],
)
def test_alphas_in_the_file_that_peft_writes_beside_count(
    settings: dict[str, Any], scale: float, write, tmp_path: Path
) -> None:
    file = write(prefix="base_model.model.").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **settings}))
    assert read_adapter(file, LAYERS, "DiT")["transformer_blocks.0.attn1.to_q"].scale == scale
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(InputError, match="a DoRA adapter"):
        read_adapter(file, LAYERS, "DiT")


def test_an_alpha_pattern_that_is_no_expression_is_one_clear_error(write) -> None:
    with pytest.raises(InputError, match=r"proj_out_2: alpha_pattern: expected regular expressions, found '\('"):
        read_adapter(write(settings={"transformer.alpha_pattern": {"(": 1}}), LAYERS, "DiT")


@pytest.mark.parametrize("model", ["FluxTransformer2DModel", "SD3Transformer2DModel", "DiTTransformer2DModel"])
def test_alphas_that_a_converter_takes_out_count(model: str, write) -> None:
    layout = {"down": ".lora.down.weight", "up": ".lora.up.weight"}
    alphas = {f"transformer.{name}.alpha": torch.tensor(2.0) for name in LAYERS}
    found = read_adapter(write(**layout, **alphas), LAYERS, model)
    assert {adapter.scale for adapter in found.values()} == {2.0 / RANK}


def test_text_encoders_are_left_out_and_said(write, tiny_artifact: Path, tmp_path: Path, caplog: Any) -> None:
    file = write(text_encoder__q__lora_A__weight=torch.ones(1, 2), text_encoder__q__lora_B__weight=torch.ones(2, 1))
    assert len(vdit_quant.join_lora(tiny_artifact, file, tmp_path / "out")) == len(LAYERS)
    assert "2 tensors of text encoders are left out" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer__attn1__to_q__lora_A__weight": torch.ones(1, 2)}, r"no such linear layer; .*attn1\.to_q"),
        ({f"{OUT}lora_A__weight": torch.ones(0, 64), f"{OUT}lora_B__weight": torch.ones(128, 0)}, r"found \[0, 64\]"),
        ({f"{OUT}lora_A__weight": torch.ones(1, 64)}, r"expected factors \[r, 64\] and \[128, r\], .* none"),
        ({f"{OUT}lora_A__weight": torch.ones(1, 64), f"{OUT}lora_B__weight": torch.ones(64, 1)}, r"and \[64, 1\]"),
        ({f"{OUT}lora_magnitude_vector": torch.ones(64)}, "lora_magnitude_vector: not part of a low-rank product"),
        ({f"{OUT}lora_B__bias": torch.ones(64)}, "not part of a low-rank product"),
        ({"settings": {"transformer.use_dora": True}}, "a DoRA adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_one_clear_error(
    change: dict[str, Any], message: str, write, tiny_artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        vdit_quant.join_lora(tiny_artifact, write(**change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_branch_wider_than_its_layer_and_other_files_are_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn1.to_q"
    wide = {f"{name}.lora_A.weight": torch.ones(65, 64), f"{name}.lora_B.weight": torch.ones(64, 65)}
    for tensors, message in ((wide, rf"{name}: rank 65 exceeds"), ({"a": torch.ones(1)}, "a: not part of")):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=message):
            vdit_quant.join_lora(tiny_artifact, tmp_path / "a.safetensors", tmp_path / "out")
    (tmp_path / "a.bin").write_bytes(b"no")
    with pytest.raises(InputError, match="a pickle"):
        vdit_quant.join_lora(tiny_artifact, tmp_path / "a.bin", tmp_path / "out")
    (tmp_path / "b.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="not a complete safetensors file"):
        vdit_quant.join_lora(tiny_artifact, tmp_path / "b.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x.lora_A.weight", "x.lora_B.weight", "x.alpha"])
def test_a_factor_that_is_not_finite_is_refused(name: str, value: float, tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.ones(2, 8), "x.lora_B.weight": torch.ones(4, 2), "x.alpha": torch.ones(1)}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=f"{name}: 1 of .* values are NaN or infinite"):
        read_adapter(tmp_path / "a.safetensors", {"x": (4, 8)}, "Model")


@pytest.mark.parametrize("scale", ["nan", "inf", "1e300"])
def test_a_scale_that_is_not_finite_is_refused(
    scale: str, write, tiny_artifact: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    done = cli("join", tiny_artifact, write(), "-o", tmp_path / "out", "--scale", scale)
    assert (done.code, "expected a finite scale, found" in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_an_output_cannot_replace_the_pipeline_it_is_made_from(
    write, demo_artifact: Callable[..., Path], copy_of: Callable[[Path], Path], cli: Callable[..., Any]
) -> None:
    folder = copy_of(demo_artifact("w8a16"))
    lora = write()
    save_file({f"{OTHER}.lora_A.weight": torch.ones(1, 128), f"{OTHER}.lora_B.weight": torch.ones(128, 1)}, lora)
    done = cli("join", folder, lora, "-o", folder, "--overwrite")
    assert done.code == 2
    assert "cannot replace the folder it is made from" in done.err
    assert done.err.strip().endswith(f"-o {folder}-2")


@pytest.mark.parametrize("layer", ["attn1.to_k", "attn1.to_out.0", "attn1.to_v", "norm1.linear"])
def test_no_adapter_joins_a_layer_that_a_scale_is_folded_into(layer: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Of what a folded scale changed, only the product is known afterwards: the adapter would act on other inputs."""
    from vdit_quant.calibrate.pipeline import compress

    how = ("smooth=fixed", "rank=0", "rounding=rtn")
    name, quick = f"transformer_blocks.0.{layer}", {"method": "svdquant", "samples": 2, "steps": 2}
    n = 384 if layer == "norm1.linear" else 64
    file = tmp_path / "lora.safetensors"
    save_file({f"{name}.lora_A.weight": torch.ones(1, 64), f"{name}.lora_B.weight": torch.ones(n, 1)}, file)
    folded = compress(tiny_folder, tmp_path / "folded", params=how, **quick)
    with pytest.raises(InputError, match=rf"{name}: .* folded .* --set fold=false"):
        vdit_quant.join_lora(folded, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stored = compress(tiny_folder, tmp_path / "stored", params=(*how, "fold=false"), **quick)
    assert vdit_quant.join_lora(stored, file, tmp_path / "out") == {name: 1}


def test_a_folder_in_the_place_of_an_adapter(tiny_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder, expected a safetensors file"):
        vdit_quant.join_lora(tiny_artifact, tmp_path, tmp_path / "out")


def test_the_command_says_what_it_joined(write, tiny_artifact: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    done = cli("join", tiny_artifact, write(), "-o", tmp_path / "out", "--scale", "0.8")
    assert done.code == 0, done.err
    assert "rank 4 in 4 layers" in done.out
    again = cli("join", tiny_artifact, write(), "-o", tmp_path / "out")
    assert again.code == 2
    assert "--overwrite" in again.err
