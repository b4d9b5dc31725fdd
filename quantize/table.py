"""Constant tables of formats on the device that needs them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def table_on(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [len(values)] on `device`, cached: read it, do not write it.

    Copied once: a copy from the host waits for the device, and cannot be captured in a CUDA graph.
    """
    with torch.inference_mode(False):  # the cached table must serve every later caller
        return torch.tensor(values, device=device)
