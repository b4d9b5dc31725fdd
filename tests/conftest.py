"""Shared fixtures: the command line in-process, subprocess environment, small models, artifacts made once a session."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models here are tiny: more threads only get in each other's way
# a calibration run long enough for every method; what a command needs to repeat `demo_artifact` follows from it
QUICK = {"steps": 5, "samples": 4}
LAYERS = ("kernels", "quantize", "runtime", "evaluate", "calibrate", "prune", "cli")


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def layers() -> tuple[str, ...]:
    """The package's folders, lowest first."""
    return LAYERS


@pytest.fixture(scope="session")
def package_sources() -> dict[Path, ast.Module]:
    """Every Python file of the package, path relative to the repository root -> syntax tree."""
    files = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    files += sorted((ROOT / "src" / "vdit_quant").glob("*.py"))
    return {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in files}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the larger test models, beside the checkout; tests that use it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with the larger test models is not here")
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of a subprocess that imports this checkout, sees no GPU and has no kernel setting."""
    dropped = ("TRITON_INTERPRET", "VDIT_KERNELS", "VDIT_STRICT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = [str(ROOT / "src"), *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(path),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def python(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a Python program in a fresh process."""

    def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=cwd or ROOT.parent,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Calls `vdit-quant` in-process, from an empty current folder."""
    from vdit_quant.cli.main import main

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["vdit-quant", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def demo() -> Path:
    """The bundled demo pipeline: read it, do not write it."""
    from vdit_quant.runtime.demo import demo_path

    return demo_path()


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The demo compressed with a shipped recipe, made once for each recipe: read it, do not write it."""
    made: dict[str, Path] = {}

    def make(bits: str = "w4a8") -> Path:
        from vdit_quant.calibrate.pipeline import compress

        if bits not in made:
            target = tmp_path_factory.mktemp("demo") / f"demo-{bits}"
            made[bits] = compress(None, target, bits=bits, **QUICK)
        return made[bits]

    return make


def _tiny_dit(seed: int = 0) -> Any:
    """A random two-block DiT of width 64, every layer of which does something."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return model.eval()


@pytest.fixture(scope="session")
def tiny_dit() -> Callable[..., Any]:
    return _tiny_dit


def _plain_recipe(spec: str) -> Any:
    """Rounding to nearest, without statistics: `spec` for attention and feed-forward layers, w8 for modulation."""
    from vdit_quant.quantize.recipe import Recipe

    core = {"method": "rtn", "spec": spec, "roles": ["attention", "feed_forward"]}
    return Recipe.from_dict({"step": [core, {"method": "rtn", "spec": "w8", "roles": ["modulation"]}]}, "plain")


@pytest.fixture(scope="session")
def plain_recipe() -> Callable[[str], Any]:
    return _plain_recipe


@pytest.fixture(scope="session")
def quick() -> dict[str, int]:
    """The settings that `demo_artifact` is made with."""
    return QUICK


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny DiT as a bare transformer folder: read it, do not write it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-dit"
    _tiny_dit().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The tiny DiT compressed as w4a8: read it, do not write it."""
    from vdit_quant.calibrate.pipeline import compress

    return compress(tiny_folder, tmp_path_factory.mktemp("tiny") / "tiny-w4a8", recipe=_plain_recipe("w4g64-a8tok"))


@pytest.fixture
def notes() -> Any:
    """A listener of a run; `lines` are the notes that it took."""
    from vdit_quant.calibrate.progress import Progress

    class Notes(Progress):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, message: str) -> None:
            self.lines.append(message)

    return Notes()


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A writable copy of a folder."""

    def copy(folder: Path) -> Path:
        target = tmp_path / "copies" / folder.name
        shutil.copytree(folder, target)
        return target

    return copy


@pytest.fixture(scope="session")
def dit_inputs() -> Callable[..., dict[str, Any]]:
    """Random call arguments for a DiT: half of the rows guided, the others with the null label."""

    def make(model: nn.Module, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        config: Any = model.config
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(batch) % 10
        labels[batch // 2 :] = 1000
        size = config.sample_size
        return {
            "hidden_states": torch.randn(batch, config.in_channels, size, size, generator=generator).to(dtype),
            "timestep": torch.full((batch,), 500),
            "class_labels": labels,
        }

    return make


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def every_spec(k: int = 64) -> list[Any]:
    """Specs that together use every discovered format and every part of a layer, for rows of `k` elements."""
    from vdit_quant.quantize import formats, registry
    from vdit_quant.quantize.errors import InputError
    from vdit_quant.quantize.spec import FormatSpec, HadamardSpec, LayerSpec

    found = []
    for name in registry.names(formats):
        fitting = []
        for group in registry.find(formats, name, "FORMAT").group_sizes:
            weight = FormatSpec(name, group)
            try:
                weight.resolve().check(k, weight)
            except InputError:
                continue
            fitting.append(weight)
        found += [LayerSpec(weight) for weight in fitting]
        token, weight = FormatSpec("int8"), fitting[-1]
        found += [
            LayerSpec(weight, token),
            LayerSpec(weight, None, hadamard=HadamardSpec(16)),
            LayerSpec(weight, token, pre_scale=True, hadamard=HadamardSpec(64, "regular"), rank=4),
        ]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `spec` runs for every spec of `every_spec`, so new formats are picked up by themselves."""
    if "spec" in metafunc.fixturenames:
        specs = every_spec()
        metafunc.parametrize("spec", specs, ids=[spec.name for spec in specs])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `gpus(n)` on a machine with fewer."""
    there = torch.cuda.device_count()
    for item in items:
        wanted = max((mark.args[0] for mark in item.iter_markers("gpus")), default=0)
        if wanted > there:
            item.add_marker(pytest.mark.skip(reason=f"GPUs: {wanted} needed, {there} visible to torch"))


@pytest.fixture(scope="session")
def random_layer() -> Callable[..., dict[str, torch.Tensor]]:
    """Random tensors of `layer_layout(n, k, spec)`, the weight through its format's encode."""

    def make(n: int, k: int, spec: Any, seed: int = 0) -> dict[str, torch.Tensor]:
        from vdit_quant.quantize.layer import layer_layout

        generator = torch.Generator().manual_seed(seed)
        tensors = spec.weight.resolve().encode(torch.randn(n, k, generator=generator), spec.weight)
        for name, layout in layer_layout(n, k, spec).items():
            if name in tensors:
                continue
            if name == "hadamard_signs":
                tensors[name] = (torch.randint(2, layout.shape, generator=generator) * 2 - 1).to(layout.dtype)
            elif name == "pre_quant_scale":
                tensors[name] = torch.rand(layout.shape, generator=generator).add(0.5).to(layout.dtype)
            else:
                tensors[name] = torch.randn(layout.shape, generator=generator).mul(0.3).to(layout.dtype)
        return tensors

    return make


@pytest.fixture(scope="session")
def sqnr() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Signal to error ratio of `got` against `want` in dB."""

    def ratio(got: torch.Tensor, want: torch.Tensor) -> float:
        error = (got.double() - want.double()).square().mean()
        return float(10 * torch.log10(want.double().square().mean() / error.clamp_min(1e-30)))

    return ratio
