"""Importing is light: no GPU, no Triton, no diffusers, and `import vdit_quant` alone takes no time."""

import subprocess
from collections.abc import Callable
from pathlib import Path

Python = Callable[..., subprocess.CompletedProcess[str]]

BLOCKED = ("triton", "diffusers", "scipy", "torchmetrics", "transformers")
# Subclasses of what diffusers has, and Triton kernels, which are Triton: imported only once those are.
EXCEPT = ("runtime/diffusers_plugin.py", "runtime/models/large_dit.py", "kernels/_triton/")


def test_every_module_imports_without_the_heavy_packages(python: Python, root: Path, layers: tuple[str, ...]) -> None:
    files = [path.relative_to(root) for layer in layers for path in sorted((root / layer).rglob("*.py"))]
    files = [path for path in files if not path.as_posix().startswith(EXCEPT)]
    modules = [".".join(("vdit_quant", *path.with_suffix("").parts)).removesuffix(".__init__") for path in files]
    assert len(modules) > 40
    program = (
        "import sys, importlib, traceback\n"
        f"sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
        "failed = 0\n"
        f"for name in {modules!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except Exception:\n"
        "        failed += 1\n"
        "        print(name, traceback.format_exc(), file=sys.stderr)\n"
        "sys.exit(failed > 0)\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_neither_torch_nor_diffusers_and_registers_later(python: Python) -> None:
    program = (
        "import sys, vdit_quant\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules, 'a heavy package was imported'\n"
        "import diffusers\n"
        "from diffusers.quantizers import auto\n"
        "assert 'vdit_quant' in auto.AUTO_QUANTIZER_MAPPING\n"
        "assert 'vdit_quant' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "assert 'bitsandbytes_4bit' in auto.AUTO_QUANTIZER_MAPPING, 'the quantizers of diffusers itself are gone'\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_after_diffusers_registers_at_once(python: Python) -> None:
    program = (
        "from diffusers import DiTTransformer2DModel\n"
        "from diffusers.quantizers import auto\n"
        "assert 'vdit_quant' not in auto.AUTO_QUANTIZER_MAPPING\n"
        "import vdit_quant\n"
        "assert 'vdit_quant' in auto.AUTO_QUANTIZER_MAPPING\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_the_public_names_resolve_and_an_unknown_one_is_an_attribute_error(python: Python) -> None:
    program = (
        "import vdit_quant\n"
        "missing = [name for name in vdit_quant.__all__ if getattr(vdit_quant, name, None) is None]\n"
        "assert not missing, missing\n"
        "assert not hasattr(vdit_quant, 'nothing_of_the_kind')\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
