"""Every way to load an artifact gives the stored numbers, bit for bit, in every compute dtype."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

import vdit_quant
from vdit_quant.calibrate.pipeline import compress
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime import writer
from vdit_quant.runtime.artifact import ArtifactConfig, make_config, read_config
from vdit_quant.runtime.attach import attach, linear_layers
from vdit_quant.runtime.linear import CompressedLinear

WEIGHTS = "diffusion_pytorch_model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "unset": None}
CASES = [
    ("w4a8", "float32"),
    ("w4a8", "bfloat16"),
    ("w4a8", "unset"),
    ("w8a8", "bfloat16"),
    ("w8a8-fp8", "bfloat16"),
    ("w4a16", "bfloat16"),
]
Artifact = Callable[..., Path]


def _options(dtype: torch.dtype | None) -> dict[str, Any]:
    return {} if dtype is None else {"torch_dtype": dtype}


def _load(way: str, folder: Path, dtype: torch.dtype | None) -> Any:
    if way == "vdit_quant.load":
        return vdit_quant.load(folder, device="cpu", dtype=dtype).transformer
    if way == "pipeline":
        return DiTPipeline.from_pretrained(folder, **_options(dtype)).transformer
    return DiTTransformer2DModel.from_pretrained(folder / "transformer", **_options(dtype))


def _compressed(model: nn.Module) -> dict[str, CompressedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}


def _stored(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for name, layer in _compressed(model).items() for key, t in layer.tensors().items()}


def _assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), want[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def expected(demo: Path, demo_artifact: Artifact, dit_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Output of the demo with the artifact's tensors attached in memory, and those tensors."""

    @torch.no_grad()
    def make(bits: str, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor, dict[str, Tensor]]:
        folder = demo_artifact(bits) / "transformer"
        model = DiTTransformer2DModel.from_pretrained(demo / "transformer", torch_dtype=dtype).eval()
        file, specs = load_file(folder / WEIGHTS), read_config(folder).resolve(linear_layers(model))
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in file.items():
            layer, _, key = name.rpartition(".")
            if layer in specs and key != "bias":
                tensors.setdefault(layer, {})[key] = tensor
        attach(model, specs, tensors)
        rest = {name: t for name, t in file.items() if name.rpartition(".")[0] not in specs or name.endswith(".bias")}
        model.load_state_dict(rest, strict=False)  # folding changes biases too
        inputs = dit_inputs(model, batch=4, dtype=dtype)
        return inputs, model(**inputs).sample, {f"{n}.{k}": t for n, ts in tensors.items() for k, t in ts.items()}

    return make


@pytest.mark.parametrize("way", ["vdit_quant.load", "pipeline", "transformer"])
@pytest.mark.parametrize(("bits", "dtype"), CASES)
@torch.no_grad()
def test_loading_gives_the_stored_tensors_and_the_same_output(
    way: str, bits: str, dtype: str, demo_artifact: Artifact, expected: Callable[..., Any]
) -> None:
    model = _load(way, demo_artifact(bits), DTYPES[dtype])
    inputs, output, tensors = expected(bits, DTYPES[dtype] or torch.float32)
    _assert_same(_stored(model), tensors)
    assert len(_compressed(model)) == 56
    assert {t.dtype for name, t in _stored(model).items() if name.endswith("_scale")} <= {torch.float32, torch.uint8}
    assert not model.training
    assert torch.equal(model(**inputs).sample, output)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_saving_a_loaded_model_and_loading_it_again_changes_nothing(
    dtype: str, demo_artifact: Artifact, dit_inputs: Callable[..., Any], tmp_path: Path
) -> None:
    model = _load("transformer", demo_artifact("w4a8"), DTYPES[dtype])
    model.save_pretrained(tmp_path / "again")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again", torch_dtype=DTYPES[dtype])
    inputs = dit_inputs(model, dtype=DTYPES[dtype])
    _assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(again(**inputs).sample, model(**inputs).sample)
    assert read_config(tmp_path / "again") == read_config(demo_artifact("w4a8") / "transformer")


@torch.no_grad()
def test_saving_a_loaded_pipeline_and_loading_it_again_changes_nothing(demo_artifact: Artifact, tmp_path: Path) -> None:
    pipe = vdit_quant.load(demo_artifact("w4a8"), device="cpu", dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "again")
    again = vdit_quant.load(tmp_path / "again", device="cpu", dtype=torch.bfloat16)
    _assert_same(again.transformer.state_dict(), pipe.transformer.state_dict())


def test_moving_a_loaded_pipeline_keeps_what_is_stored(demo_artifact: Artifact, expected: Callable[..., Any]) -> None:
    pipe = vdit_quant.load(demo_artifact("w4a8"), device="cpu", dtype=torch.float32)
    _, _, tensors = expected("w4a8", torch.float32)
    pipe.to("cpu")
    _assert_same(_stored(pipe.transformer), tensors)
    with pytest.raises(ValueError, match="dtype"):  # diffusers' rule for every quantized model
        pipe.transformer.to(torch.bfloat16)
    nn.Module.to(pipe.transformer, torch.bfloat16)  # what offloading and wrappers call
    _assert_same(_stored(pipe.transformer), tensors)
    assert pipe.transformer.proj_out_1.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_a_bare_transformer_artifact_loads_as_a_transformer(
    tiny_artifact: Path, dit_inputs: Callable[..., Any]
) -> None:
    model = vdit_quant.load(tiny_artifact, device="cpu")
    assert isinstance(model, DiTTransformer2DModel)
    plain = DiTTransformer2DModel.from_pretrained(tiny_artifact)
    inputs = dit_inputs(model)
    assert torch.equal(model(**inputs).sample, plain(**inputs).sample)


def test_a_sharded_artifact_loads_the_same(
    demo: Path, demo_artifact: Artifact, quick: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 700_000)
    folder = compress(demo, tmp_path / "sharded", bits="w4a8", **quick)
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 700_000 + 20_000 for path in shards[1:-1])
    whole = _load("pipeline", demo_artifact("w4a8"), torch.bfloat16)
    for way in ("vdit_quant.load", "pipeline", "transformer"):
        _assert_same(_load(way, folder, torch.bfloat16).state_dict(), whole.state_dict())


@torch.no_grad()
def test_dequantize_gives_a_plain_model_of_the_same_output(
    demo_artifact: Artifact, dit_inputs: Callable[..., Any], tmp_path: Path, sqnr: Callable[..., float]
) -> None:
    model = _load("transformer", demo_artifact("w4a16"), torch.float32)
    inputs = dit_inputs(model)
    want = model(**inputs).sample
    weights = {name: layer.dequantized() for name, layer in _compressed(model).items()}
    plain = model.dequantize()
    assert not _compressed(plain)
    assert all(torch.equal(plain.get_submodule(name).weight, weight) for name, weight in weights.items())
    assert sqnr(plain(**inputs).sample, want) > 90
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(**inputs).sample, plain(**inputs).sample)


def test_the_pipeline_folder_is_complete_and_holds_nothing_executable(demo: Path, demo_artifact: Artifact) -> None:
    folder = demo_artifact("w4a8")
    held = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    source = {path.relative_to(demo) for path in demo.rglob("*") if path.is_file()}
    assert held == source
    assert (folder / "vae" / WEIGHTS).read_bytes() == (demo / "vae" / WEIGHTS).read_bytes()


def test_equal_runs_give_equal_bytes(demo_artifact: Artifact, quick: dict[str, int], tmp_path: Path) -> None:
    again = compress(None, tmp_path / "again", bits="w4a8", **quick)
    for path in sorted(p for p in again.rglob("*") if p.is_file()):
        assert path.read_bytes() == (demo_artifact("w4a8") / path.relative_to(again)).read_bytes(), path


@pytest.mark.gpus(1)
@pytest.mark.parametrize("bits", ["w4a8", "w4a4"])
def test_on_a_gpu_equal_runs_give_equal_bytes(bits: str, quick: dict[str, int], tmp_path: Path) -> None:
    one, other = (compress(None, tmp_path / name, bits=bits, device="cuda", **quick) for name in ("one", "other"))
    for path in (path for path in other.rglob("*") if path.is_file()):
        assert path.read_bytes() == (one / path.relative_to(other)).read_bytes(), path


def test_the_artifact_is_as_small_as_it_says(demo: Path, demo_artifact: Artifact) -> None:
    sizes = [(folder / "transformer" / WEIGHTS).stat().st_size for folder in (demo, demo_artifact("w4a8"))]
    assert sizes[1] < 0.65 * sizes[0]  # the demo's embedding tables, which stay, are a third of it


def test_rules_give_every_layer_its_own_spec_whatever_the_pattern() -> None:
    from vdit_quant.quantize.spec import LayerSpec

    names = [f"blocks.{i}.{part}" for i in range(12) for part in ("to_q", "ff.0.proj", "ff.10.proj")]
    w4, w8 = LayerSpec.parse("w4"), LayerSpec.parse("w8")
    for specs in (
        dict.fromkeys(names, w4),
        {name: (w8 if ".1." in name else w4) for name in names},
        {name: w8 for name in names if name.endswith("to_q") and not name.startswith("blocks.3.")},
        {names[0]: w4},
    ):
        config = make_config(specs, names, {}, {})
        assert config.resolve(names) == specs
        assert ArtifactConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_device_map_is_made_for_what_the_model_takes(demo_artifact: Artifact) -> None:
    sizes = pytest.importorskip("accelerate.utils").compute_module_sizes
    folder = demo_artifact("w4a8") / "transformer"
    model: Any = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    counted = sizes(model, dtype=model.hf_quantizer.adjust_target_dtype(torch.bfloat16))[""]
    assert counted == pytest.approx(sum(t.nbytes for t in (*model.parameters(), *model.buffers())), rel=0.05)


@torch.no_grad()
def test_modules_that_a_device_map_keeps_on_the_cpu_beside_a_gpu_come_from_there(
    demo_artifact: Artifact,
    dit_inputs: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    accelerate = pytest.importorskip("accelerate")
    folder = demo_artifact("w4a8") / "transformer"
    plain: Any = DiTTransformer2DModel.from_pretrained(folder)

    def offload(model: nn.Module, **_: Any) -> None:
        """What accelerate does to such modules, with a CPU in the GPU's place."""
        accelerate.cpu_offload(model, torch.device("cpu"))

    monkeypatch.setattr("diffusers.models.modeling_utils.dispatch_model", offload)
    model: Any = DiTTransformer2DModel.from_pretrained(folder, device_map={"": "cpu"})
    assert any(t.is_meta for t in model.state_dict().values())
    inputs = dit_inputs(model)
    assert torch.equal(model(**inputs).sample, plain(**inputs).sample)
    left = sum(t.nbytes for m in model.modules() if isinstance(m, CompressedLinear) for t in m.buffers())
    assert f"device_map: {left / 1e6:.3f} MB of codes and scales are on the GPU" in caplog.text


def test_a_device_map_to_disk_is_refused(demo_artifact: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder, rest = demo_artifact("w4a8") / "transformer", ("pos_embed", "norm_out", "proj_out_1", "proj_out_2")
    devices = {**dict.fromkeys(rest, "cpu"), "transformer_blocks": "disk"}
    with pytest.raises(InputError, match='cannot be used from "disk"; map their modules to "cpu"'):
        DiTTransformer2DModel.from_pretrained(folder, device_map=devices, offload_folder=tmp_path)
