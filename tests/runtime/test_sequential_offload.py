"""Offloaded layer by layer, a compressed model leaves nothing on the GPU between calls, and computes the same."""

from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from small_models import CASES, build, call, close, compressed
from torch import Tensor, nn

from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.attach import attach, detach
from vdit_quant.runtime.fusion import fuse
from vdit_quant.runtime.linear import CompressedLinear


class Pipe(DiffusionPipeline):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


@pytest.fixture(autouse=True)
def _a_cpu_in_place_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offloaded tensors are on the meta device between calls; diffusers itself wants a device with a number."""
    offload = accelerate.cpu_offload

    def on_a_cpu(model: nn.Module, device: torch.device, **options: Any) -> nn.Module:
        return offload(model, torch.device("cpu"), **options)

    monkeypatch.setattr(accelerate, "cpu_offload", on_a_cpu)
    with torch.no_grad():
        yield


def offloaded(model: nn.Module) -> Pipe:
    pipe = Pipe(model)
    pipe.enable_sequential_cpu_offload(device="cpu")
    # where the inputs go is read off the parameters, which are on the meta device now
    model.parameters = lambda *_, **__: iter([torch.zeros(1)])  # type: ignore[method-assign]
    return pipe


def left_on_the_gpu(model: nn.Module) -> set[str]:
    """Names of the tensors of compressed layers that stay where they run."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}
    assert layers
    return {f"{name}.{key}" for name, m in layers.items() for key, t in m.state_dict().items() if not t.is_meta}


def with_one_embedder(model: nn.Module) -> nn.Module:
    """With the weights of the published DiT models, whose blocks all have the same embedder."""
    blocks: Any = model.transformer_blocks
    for block in blocks:
        block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return model


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", CASES)
def test_codes_and_scales_are_offloaded_with_the_rest_of_their_layer(kind: str, fused: bool) -> None:
    case, model = CASES[kind], compressed(CASES[kind])
    expected = call(model, case)
    offloaded(fuse(model, cpu=True) if fused else model)
    for _ in range(2):
        assert left_on_the_gpu(model) == set()
        assert close(call(model, case), expected)


def test_each_layer_is_there_while_it_runs_and_no_other() -> None:
    case, model = CASES["flux"], fuse(compressed(CASES["flux"]), cpu=True)
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    seen: list[list[bool]] = []
    offloaded(model)
    for layer in layers:
        own = layer._old_forward  # what accelerate calls between fetching the layer and leaving it

        def look(x: Tensor, own: Any = own, layer: nn.Module = layer) -> Any:
            seen.append([m is layer for m in layers if not next(m.buffers()).is_meta])
            return own(x)

        layer._old_forward = look
    call(model, case)
    assert len(seen) >= len(layers)
    assert all(there == [True] for there in seen)


def test_a_shared_embedder_is_offloaded_and_comes_back() -> None:
    case = CASES["dit"]
    model: Any = fuse(with_one_embedder(compressed(case)), cpu=True)
    emb = model.transformer_blocks[0].norm1.emb
    assert model.transformer_blocks[2].norm1.emb is emb
    expected = call(model, case)
    pipe = offloaded(model)
    assert all(t.is_meta for t in emb.state_dict().values())
    assert close(call(model, case), expected)
    pipe.remove_all_hooks()
    del model.parameters
    assert not any(t.is_meta for t in model.state_dict().values())
    assert close(call(model, case), expected)


def test_a_compressed_model_has_the_parameters_and_tensors_that_its_layers_have() -> None:
    plain, model = build(CASES["flux"]), compressed(CASES["flux"])
    inside = {name for name, m in model.named_modules() if isinstance(m, CompressedLinear)}

    def outside(names: Any) -> set[str]:
        return {name for name in names if name.rpartition(".")[0] not in inside}

    assert outside(model.state_dict()) == outside(plain.state_dict())
    assert outside(dict(model.named_parameters())) == outside(dict(plain.named_parameters()))


def test_a_model_without_its_compressed_layers_is_what_it_was() -> None:
    model = build(CASES["flux"])
    names = list(model._parameters)
    specs = {"x_embedder": LayerSpec.parse("w8")}
    tensors = {
        "x_embedder": specs["x_embedder"]
        .weight.resolve()
        .encode(model.x_embedder.weight.float(), specs["x_embedder"].weight)
    }
    originals = attach(model, specs, tensors)
    assert len(model._parameters) > len(names)
    detach(model, originals)
    assert list(model._parameters) == names
