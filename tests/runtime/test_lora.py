"""Adapters on top of a compressed model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel


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
