"""Files of kernels in Gluon: where they run, and what is said where they fail.

Gluon is experimental: another Triton may lack any part of it, or not compile a kernel. So every such file has a
portable Triton kernel beside it, which after one failure on a device runs there instead.
"""

import importlib
from types import ModuleType

import torch

from ..dispatch import remember
from .tiles import INTERPRETED


class GluonFile:
    """A file of this folder that is imported where a device can run its kernels.

    instead: what runs where they fail, in the words of the log
    hopper: they are for Hopper alone, not for every NVIDIA GPU
    """

    def __init__(self, name: str, instead: str, hopper: bool = False) -> None:
        self.name, self.instead, self.hopper = name, instead, hopper
        self._found: dict[torch.device, ModuleType | str] = {}

    def on(self, device: torch.device) -> ModuleType | None:
        """The file, where `device` and this Triton can run it."""
        found = self._found.get(device) or self._find(device)
        return None if isinstance(found, str) else found

    def reason(self, device: torch.device) -> str | None:
        """Why the file is not used on `device`; None where it is."""
        found = self._found.get(device) or self._find(device)
        return found if isinstance(found, str) else None

    def note(self, device: torch.device) -> str | None:
        """What runs instead and why, where the file has failed; None where it is used, or not meant to be."""
        reason = self.reason(device)
        return None if reason is None or _unfit(device, self.hopper) is not None else f"{self.instead}: {reason}"

    def leave(self, device: torch.device, error: Exception) -> None:
        """Do without the file on `device`, where a launch raised `error`, and say so once.

        Only Triton's errors count, those of a kernel that does not compile or does not fit; others are raised again.
        """
        if not type(error).__module__.startswith("triton"):
            raise error
        self._give_up(device, f"{type(error).__name__}: {error}")

    def _find(self, device: torch.device) -> ModuleType | str:
        if (reason := _unfit(device, self.hopper)) is not None:
            return self._found.setdefault(device, reason)
        try:
            return self._found.setdefault(device, importlib.import_module(f".{self.name}", __package__))
        except Exception as error:
            lacking = f"this Triton has no Gluon as {self.name}.py needs it"
            self._give_up(device, f"{lacking}: {type(error).__name__}: {error}")
            return self._found[device]

    def _give_up(self, device: torch.device, reason: str) -> None:
        if not isinstance(self._found.get(device), str):
            self._found[device] = reason
            remember(self.name, f"{device}: {reason}", "%s on %s: %s", self.instead, device, reason)


def _unfit(device: torch.device, hopper: bool) -> str | None:
    """Why no Gluon of ours is for `device`: nothing has failed, so nothing is logged."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return "not an NVIDIA GPU"
    if hopper and torch.cuda.get_device_capability(device)[0] != 9:
        return "not a Hopper GPU"
    return "Triton's interpreter does not know Gluon" if INTERPRETED else None
