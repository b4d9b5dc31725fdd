"""What this machine can run: versions, accelerator, and the backend each kernel will use."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from ..kernels import dispatch, launch_table
from .load import default_device

PACKAGES = ("vdit-quant", "torch", "triton", "diffusers", "safetensors", "accelerate", "transformers", "scipy")


def examine() -> dict[str, Any]:
    """Facts about the machine, one row a kernel, and what would make it better."""
    device = default_device()
    machine: dict[str, Any] = {"python": platform.python_version()}
    machine.update({name: _version(name) for name in PACKAGES})
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["GPU"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        machine["capability"] = f"{properties.major}.{properties.minor}"
        machine["launch table"] = _launch_table(device)
    else:
        machine["GPU"] = "none found"
    choices = [dispatch.explain(op, device) for op in dispatch.TWINS]
    rows = [{"op": c.op, "backend": c.backend, "reason": c.note or c.reason} for c in choices]
    return {"machine": machine, "kernels": rows, "advice": _advice(machine, device)}


def _launch_table(device: torch.device) -> str:
    try:
        return launch_table.in_use(device)
    except dispatch.SettingError as error:
        return f"error: {error}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _advice(machine: dict[str, Any], device: torch.device) -> list[str]:
    advice = []
    if device.type != "cuda":
        advice.append("no GPU: everything runs through the torch references: correct, not fast")
    if machine["triton"] == "not installed" and device.type == "cuda":
        advice.append("install triton to run the low-bit kernels")
    if machine["transformers"] == "not installed":
        advice.append("text-conditioned pipelines (PixArt, SD3, Flux, Wan) need: pip install 'vdit-quant[text]'")
    return advice or ["nothing to improve"]
