"""The compressed layer: an `nn.Linear` with plain buffers, so LoRA injection, offload and hooks treat it as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.format import Tensors
from ..quantize.layer import dense_weight, layer_layout, run_layer
from ..quantize.spec import LayerSpec


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a hook's linear layer was called with, by position or by name."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


class CompressedLinear(nn.Linear):
    """`y = run_layer(x)` for x [..., K] in any float dtype; y [..., N] in the same dtype.

    Every stored tensor of `layer_layout(N, K, spec)` is a buffer of that name. Built from a spec alone, also on the
    meta device. Casting the module to another dtype moves the bias and leaves codes and scales as they are stored.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LayerSpec,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.active_spec = spec
        for name, layout in layer_layout(out_features, in_features, spec).items():
            self.register_buffer(name, torch.empty(layout.shape, dtype=layout.dtype, device=device))
        if bias:
            empty = torch.empty(out_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(empty, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @property
    def active_spec(self) -> LayerSpec:
        """What runs now: a step plan may lift the activation quantiser for a while."""
        return self._active_spec

    @active_spec.setter
    def active_spec(self, spec: LayerSpec) -> None:
        self._active_spec = spec
        self.is_lifted = spec != self.spec  # a plain flag: torch.compile guards on it, and cannot compare the specs

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype that peft casts an adapter to, in place of the weight's, which may be fp8: the bias's; without a
        bias None, and the adapter keeps its own."""
        return None if self.bias is None else self.bias.dtype

    def load_tensors(self, tensors: Tensors, bias: Tensor | None = None) -> None:
        """Replaces every buffer, and the bias. Raises KeyError for a missing tensor."""
        for name in self._buffers:
            self._buffers[name] = tensors[name].contiguous()
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def tensors(self) -> Tensors:
        """The stored tensors by name, without the bias."""
        return {name: t for name, t in self._buffers.items() if t is not None}

    def dequantized(self) -> Tensor:
        """float32 [N, K]: the dense weight that this layer stands for."""
        return dense_weight(self.tensors(), self.in_features, self.spec)

    def forward(self, input: Tensor) -> Tensor:  # the argument of nn.Linear, which may be called by its name
        y = run_layer(input.reshape(-1, self.in_features), self.tensors(), self.active_spec, self.bias)
        return y.reshape(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedLinear:
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, spec={self.spec.name}"
