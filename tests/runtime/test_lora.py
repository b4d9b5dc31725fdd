"""Adapters on top of a compressed model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxPipeline
from small_models import CASES, call, compressed
from torch import nn

from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.fusion import fuse


@torch.no_grad()
def test_a_lora_adapter_attaches_to_compressed_layers(tiny_artifact: Path, dit_inputs: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    model = DiTTransformer2DModel.from_pretrained(tiny_artifact)
    inputs = dit_inputs(model)
    before = model(**inputs).sample
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"]), model)
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert len(adapters) == 4
    assert torch.equal(model(**inputs).sample, before), "a fresh adapter is zero"
    for parameter in adapters.values():
        parameter.fill_(0.1)
    assert not torch.equal(model(**inputs).sample, before)


def with_adapter(model: nn.Module, *layers: str) -> nn.Module:
    """The model with a LoRA on these layers."""
    pytest.importorskip("peft")
    torch.manual_seed(5)
    adapter = {}
    for name in layers:
        layer = model.get_submodule(name)
        adapter[f"transformer.{name}.lora_A.weight"] = 0.2 * torch.randn(4, layer.in_features)
        adapter[f"transformer.{name}.lora_B.weight"] = 0.2 * torch.randn(layer.out_features, 4)
    model.load_lora_adapter(adapter)
    return model


@pytest.mark.parametrize("safe", [False, True])
@torch.no_grad()
def test_merging_an_adapter_into_compressed_layers_is_refused_and_merges_nothing(safe: bool) -> None:
    case = CASES["sd3"]
    # the first of them, which is not compressed, could be merged
    model = with_adapter(compressed(case, "w8-a8tok"), "context_embedder", "transformer_blocks.1.attn.to_q")
    before = call(model, case)
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.attn\.to_q is compressed.*join_lora"):
        model.fuse_lora(safe_fusing=safe)
    assert torch.equal(call(model, case), before)
    assert not model.context_embedder.merged


@torch.no_grad()
def test_an_adapter_on_other_layers_is_merged_as_ever() -> None:
    case = CASES["sd3"]
    model = with_adapter(compressed(case, "w8-a8tok"), "context_embedder")
    before = call(model, case)
    model.fuse_lora()
    assert model.context_embedder.merged
    torch.testing.assert_close(call(model, case), before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wan", "large_dit"])  # with a bias and without
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_fp8_weights_runs_in_the_models_dtype(kind: str, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    case = CASES[kind]
    model = compressed(case, "wf8-a8tok").to(dtype)
    dtypes = dict.fromkeys(case.shapes, dtype)
    before = call(model, case, dtypes=dtypes)
    targets = ["to_q", "wq"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False), model)
    after = call(model, case, dtypes=dtypes)
    assert after.dtype == dtype
    assert after.isfinite().all()
    assert not torch.equal(after, before)


@torch.no_grad()
@pytest.mark.parametrize("stored", ["w8-a8tok", "w4g16-a8tok-h16", "w3g32-a8tok"])
def test_a_flux_pipeline_loads_a_lora_onto_packed_weights(stored: str) -> None:
    pytest.importorskip("peft")
    case = CASES["flux"]
    model: Any = fuse(compressed(case, stored), cpu=True)
    model.hf_quantizer = object()  # as from_pretrained leaves it
    before = call(model, case)
    parts = ("vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = FluxPipeline(**dict.fromkeys(parts), transformer=model)
    lora = {
        f"transformer.{layer}.lora_{side}.weight": torch.randn(shape) / 10
        for layer in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k")
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    pipe.load_lora_weights(dict(lora), adapter_name="one")
    after = call(model, case)
    assert not torch.equal(after, before)
    pipe.load_lora_weights(dict(lora), adapter_name="another")  # beside the first, whose layers are wrapped
    pipe.set_adapters(["another"])
    assert torch.equal(call(model, case), after)
    pipe.unload_lora_weights()
    assert torch.equal(call(model, case), before)
