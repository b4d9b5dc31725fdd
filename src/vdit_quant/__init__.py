"""vdit-quant: compress Diffusion Transformers, prove what it cost, run the result.

After `import vdit_quant`, plain diffusers `from_pretrained` loads vdit-quant artifacts.
"""

from importlib import import_module, metadata

from .runtime.registration import register_with_diffusers

__all__ = [
    "InputError", "compare", "compress", "fuse", "join_lora", "load", "load_into", "prune_model", "replay_graphs",
]  # fmt: skip

_PLACES = {
    "InputError": ".quantize.errors",
    "compress": ".calibrate.pipeline",
    "compare": ".evaluate.compare",
    "fuse": ".runtime.fusion",
    "join_lora": ".runtime.adapter",
    "load": ".runtime.load",
    "load_into": ".runtime.load",
    "prune_model": ".prune.pipeline",
    "replay_graphs": ".runtime.graphs",
}

try:
    __version__ = metadata.version("vdit-quant")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

register_with_diffusers()


def __getattr__(name: str) -> object:
    # torch is imported only when one of these is used, so `import vdit_quant` and `vdit-quant --help` are instant
    if name in _PLACES:
        return getattr(import_module(_PLACES[name], __name__), name)
    raise AttributeError(f"module 'vdit_quant' has no attribute '{name}'")
