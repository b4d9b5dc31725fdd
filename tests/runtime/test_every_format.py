"""Every number format in an artifact: stored, loaded and run on a CPU, and on a GPU by kernels alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from torch import Tensor, nn

import vdit_quant
from vdit_quant.kernels import dispatch
from vdit_quant.quantize import formats, registry
from vdit_quant.quantize.recipe import Recipe
from vdit_quant.quantize.spec import FormatSpec, LayerSpec
from vdit_quant.runtime.artifact import read_config
from vdit_quant.runtime.attach import linear_layers
from vdit_quant.runtime.describe import describe_artifact
from vdit_quant.runtime.linear import CompressedLinear
from vdit_quant.runtime.load import linear_shapes
from vdit_quant.runtime.source import find_source

WIDTH = 128
LOW = ("w4g64-a4g64", "wfp4-ae2m1tok", "wfp4-ae2m1g16", "wmxfp4g32-amxfp4g32", "wnvfp4g16-anvfp4g16", "wf8-af8tok")
"""Activations of other formats than int8, each beside weights that go with them."""


def _weights() -> list[str]:
    """Every format with whole rows, where it has them, and with its smallest groups."""
    specs = []
    for name in registry.names(formats):
        groups = registry.find(formats, name, "FORMAT").group_sizes
        smallest = min((g for g in groups if g), default=None)
        specs += [LayerSpec(FormatSpec(name, g)).name for g in dict.fromkeys((None, smallest)) if g in groups]
    return specs


def _specs() -> list[str]:
    """The weights alone, all of them with int8 activations where those fit, and LOW."""
    return [*_weights(), *(f"{weight}-a8tok" for weight in _weights()), *LOW]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2, "in_channels": 4, "out_channels": 4}
    whole = DiTTransformer2DModel(**config, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    folder = tmp_path_factory.mktemp("model")
    whole.save_pretrained(folder)
    return folder


@pytest.fixture
def artifact(model: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(spec: str) -> Path:
        core = {"method": "rtn", "spec": spec, "roles": ["attention", "feed_forward"]}
        modulation = {"method": "rtn", "spec": spec.partition("-")[0], "roles": ["modulation"]}
        recipe = Recipe.from_dict({"name": "all", "step": [core, modulation]}, "test")
        return vdit_quant.compress(model, tmp_path / "artifact", recipe=recipe, i_know=True, device="cpu")

    return make


def _run(folder: Path, device: str) -> Tensor:
    return _forward(vdit_quant.load(folder, device=device, dtype=torch.float32), device)


@torch.no_grad()
def _forward(model: nn.Module, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator).to(device)
    inputs: dict[str, Any] = {"timestep": torch.tensor([900, 500, 10]), "class_labels": torch.tensor([1, 2, 3])}
    return model(x, **{name: t.to(device) for name, t in inputs.items()}).sample.cpu()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", _weights())
def test_inspect_shows_the_bytes_of_the_file(name: str, artifact: Callable[[str], Path]) -> None:
    folder = artifact(name)
    source = find_source(folder)
    names = read_config(folder).resolve(linear_shapes(source.skeleton()))
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        sizes = {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118
    stored = [size for n, size in sizes.items() if n.rpartition(".")[0] in names and not n.endswith(".bias")]
    assert describe_artifact(folder, "cpu")["compressed_bytes"] == sum(stored)


@pytest.mark.parametrize("name", _specs())
def test_an_artifact_runs_on_a_cpu_as_the_weights_it_stands_for(name: str, artifact: Callable[[str], Path]) -> None:
    folder = artifact(name)
    found = _run(folder, "cpu")
    dense = vdit_quant.load(folder, device="cpu", dtype=torch.float32)
    for place, layer in linear_layers(dense).items():
        if isinstance(layer, CompressedLinear):
            plain = torch.nn.Linear(layer.in_features, layer.out_features)
            plain.weight, plain.bias = torch.nn.Parameter(layer.dequantized()), layer.bias
            dense.set_submodule(place, plain)
    bits = 16 if "-a" not in name else 8 if "8tok" in name else 4
    assert relative(found, _forward(dense, "cpu")) < {16: 1e-5, 8: 0.05, 4: 0.4}[bits]


@pytest.mark.gpus(1)
@pytest.mark.parametrize("name", _specs())
def test_an_artifact_runs_on_a_gpu_by_kernels_alone(name: str, artifact: Callable[[str], Path]) -> None:
    folder = artifact(name)
    with dispatch.use(strict=True):
        found = _run(folder, "cuda")
    # other rounding before a quantiser moves single codes by one step
    assert relative(found, _run(folder, "cpu")) < (1e-3 if "-a" not in name else 0.02 if "8tok" in name else 0.1)
