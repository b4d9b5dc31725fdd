"""The diffusers quantizer behind `quant_method: "vdit_quant"`. `register` teaches it to plain `from_pretrained`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ..quantize.errors import InputError
from .artifact import QUANT_METHOD, ArtifactConfig
from .attach import attach, linear_layers
from .complete import strangers
from .fusion import fuse, unfuse
from .linear import CompressedLinear
from .schedule import apply_plans

logger = logging.getLogger("vdit_quant")


class _Method(StrEnum):
    """diffusers reads `quant_method.value`, so a plain string will not do."""

    VDIT_QUANT = QUANT_METHOD


class VditQuantConfig(QuantizationConfigMixin):
    """`ArtifactConfig` in the form diffusers passes around."""

    def __init__(self, artifact: ArtifactConfig) -> None:
        self.artifact = artifact
        self.quant_method = _Method.VDIT_QUANT  # type: ignore[assignment]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(ArtifactConfig.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.artifact.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class VditQuantizer(DiffusersQuantizer):
    """Builds the compressed layers from the config alone, then takes every stored tensor exactly as it is on disk."""

    use_keep_in_fp32_modules = True
    stored: Sequence[str] = ()  # names of all tensors in the files

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.stored = loaded_keys
        return loaded_keys

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise InputError(
                'device_map: compressed layers cannot be used from "disk"; map their modules to "cpu", or with '
                'device_map="auto" allow the CPU more in max_memory'
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise InputError("VditQuantConfig loads artifacts; to make one, run `vdit-quant calibrate`")
        assert isinstance(self.quantization_config, VditQuantConfig)
        config = self.quantization_config.artifact
        attach(model, config.resolve(linear_layers(model)))
        if others := strangers(model, self.stored):
            raise InputError(f"artifact: config and tensors disagree: expected no {others[0]}, found it in the file")
        model.config.quantization_config = self.quantization_config

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        offloaded = False
        for name, tensor in model.state_dict().items():
            if tensor.device.type != "meta":
                continue
            if "_hf_hook" not in vars(model.get_submodule(name.rpartition(".")[0])):
                raise InputError(f"artifact: config and tensors disagree: {name} {list(tensor.shape)} is in no file")
            offloaded = True  # by a device map: it comes from the CPU when its module is called
        if offloaded and (left := _left_behind(model)):
            logger.warning(
                "device_map: %.3f MB of codes and scales are on the GPU though their modules are mapped to the CPU: "
                "diffusers moves no buffers; load without a device map and use pipe.enable_sequential_cpu_offload()",
                left / 1e6,
            )
        assert isinstance(self.quantization_config, VditQuantConfig)
        apply_plans(model, self.quantization_config.artifact.plans)
        return model if offloaded else fuse(model)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        layer, _, key = param_name.rpartition(".")
        module = model.get_submodule(layer)
        return isinstance(module, CompressedLinear) and key in module._buffers

    def check_quantized_param_shape(self, param_name: str, current: Any, loaded: Tensor) -> bool:
        shape = current.shape if isinstance(current, Tensor) else current
        if tuple(shape) != tuple(loaded.shape):
            raise InputError(
                f"artifact: config and tensors disagree: {param_name} is {list(loaded.shape)} in the file, "
                f"its spec expects {list(shape)}"
            )
        return True

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        layer, _, key = param_name.rpartition(".")
        module = model.get_submodule(layer)
        # diffusers has cast param_value to the asked-for dtype; the state dict still holds what the file holds
        stored, expected = state_dict[param_name], module._buffers[key]
        assert expected is not None
        if stored.dtype != expected.dtype:
            raise InputError(
                f"artifact: config and tensors disagree: {param_name} is {stored.dtype} in the file, "
                f"its spec expects {expected.dtype}"
            )
        module._buffers[key] = stored.to(target_device).contiguous()

    def _dequantize(self, model: Any) -> Any:
        unfuse(model)
        for name, layer in linear_layers(model).items():
            if isinstance(layer, CompressedLinear):
                model.set_submodule(name, _dense(layer, model.dtype))
        # a plain model now: saved with our config in it, it would not load
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _left_behind(model: nn.Module) -> int:
    """Bytes that compressed layers hold where they run, though the rest of them waits elsewhere to be called."""
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    waiting = [m for m in layers if getattr(vars(m).get("_hf_hook"), "offload", False)]
    return sum(t.nbytes for layer in waiting for t in layer.buffers() if not t.is_meta)


def _dense(layer: CompressedLinear, dtype: torch.dtype) -> nn.Linear:
    weight = layer.dequantized().to(dtype)
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, weight.device, dtype)
    dense.weight.data.copy_(weight)
    if layer.bias is not None:
        dense.bias.data.copy_(layer.bias)
    return dense


def register() -> None:
    """Adds the method to the tables that diffusers looks quantizers up in; safe to call again."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = VditQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = VditQuantConfig
