"""What an installed copy holds, and that the folder names at the repository root get in nobody's way."""

import importlib.machinery
import shutil
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest


def test_every_folder_is_linked_into_the_package(root: Path, layers: tuple[str, ...]) -> None:
    for layer in layers:
        link = root / "src" / "vdit_quant" / layer
        assert link.is_symlink(), f"{link} is not a link"
        assert link.resolve() == (root / layer).resolve()


def test_our_kernels_folder_does_not_shadow_hugging_face_kernels(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "kernels" / "__init__.py"
    other.parent.mkdir()
    other.touch()
    spec = importlib.machinery.PathFinder.find_spec("kernels", [str(root), str(tmp_path)])
    assert spec is not None
    assert spec.origin == str(other)


def test_package_data_is_reachable() -> None:
    recipes = resources.files("vdit_quant.quantize") / "recipes"
    assert {p.name for p in recipes.iterdir()} >= {"w8a8.toml", "w4a8.toml", "w4a16.toml", "w8a16.toml"}
    for name in ("prompts_calibrate.txt", "prompts_compare.txt"):
        assert (resources.files("vdit_quant.evaluate") / name).read_text(encoding="utf-8").strip()
    demo = resources.files("vdit_quant.runtime") / "demo_data"
    assert (demo / "model_index.json").is_file()
    assert (demo / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert (resources.files("vdit_quant") / "py.typed").is_file()


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_all_data(root: Path, layers: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in (*layers, "src"):
        shutil.copytree(root / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "*.pyc"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(root / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    built = subprocess.run(
        [*command, "-w", str(tmp_path), str(copy)], capture_output=True, text=True, timeout=300, check=False
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert all(name.startswith("vdit_quant/") for name in held), "a folder of ours became a top-level package"
    wanted = {
        f"vdit_quant/{path.relative_to(root).as_posix()}"
        for layer in layers
        for path in (root / layer).rglob("*")
        if path.is_file() and path.suffix in (".py", ".toml", ".json", ".txt", ".safetensors", ".html")
    }
    assert wanted - held == set()
