"""Every script in examples/ and every file in the guide to extending runs as a user would run it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WRITES = {
    "compress_demo.py": ("digits.png", "demo-w4a8/transformer/config.json"),
    "plain_diffusers.py": ("seven.png",),
    "own_module.py": ("tiny-w4a8/config.json",),
}


def test_every_example_is_run(root: Path) -> None:
    assert {path.name for path in (root / "examples").glob("*.py")} == set(WRITES)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(WRITES))
def test_example_runs(script: str, tmp_path: Path, root: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(root / "examples" / script), str(tmp_path)],
        env={**environment, "OMP_NUM_THREADS": "1"},  # the models are tiny: one thread is fastest
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in WRITES[script]:
        assert (tmp_path / name).stat().st_size > 0


PLUGIN = re.compile(r'```python title="((?:quantize|runtime|prune|cli)/[\w/]+\.py)"\n(.*?)```', re.DOTALL)

USE_PLUGINS = """
import torch
from diffusers import AuraFlowTransformer2DModel
from vdit_quant.calibrate.pipeline import compress
from vdit_quant.quantize.compose import Choices, compress_linear
from vdit_quant.quantize.method import FloatLayer
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.runtime.attach import attach, linear_layers
from vdit_quant.runtime.fusion import fuse
from vdit_quant.runtime.family import find_family

spec = LayerSpec.parse("wt5").weight
grid = torch.tensor([[-1.0, 1.0, 0.0, 1.0, 1.0, -1.0]]) * 0.5
assert torch.equal(spec.resolve().decode(spec.resolve().encode(grid, spec), 6, spec), grid)

model = AuraFlowTransformer2DModel(
    sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=16,
)
family = find_family(model)
roles = family.linears(model)
assert family.name == "auraflow", family.name
assert set(roles.values()) == {"attention", "feed_forward", "modulation", "embedder", "output"}, roles

x = torch.randn(1, 5, 32)
feed_forward = model.joint_transformer_blocks[0].ff
make = lambda layer: compress_linear(FloatLayer("", layer.weight.detach()), None, int8, Choices(rounding="rtn"))
int8 = LayerSpec.parse("w8-a8tok")
with torch.no_grad():
    attach(feed_forward, dict.fromkeys(linear_layers(feed_forward), int8),
           {name: make(layer) for name, layer in linear_layers(feed_forward).items()})
    expected = feed_forward(x)
    fuse(model, cpu=True)
    assert "forward" in feed_forward.__dict__
    assert (feed_forward(x) - expected).norm() < 1e-3 * expected.norm()

compress("demo", "out", bits="w4a8", method="shrink")
open("two.toml", "w").write('[[step]]\\nmethod = "rtn"\\nspec = "wt5"\\nroles = ["feed_forward"]\\n')
compress("demo", "two", recipe="two.toml")

from vdit_quant.prune.pipeline import prune_model
from vdit_quant.prune.writer import read_record

pruned = prune_model("demo", "d3", keep=3, criterion="last_kept", recover="0", samples=8, steps=1)
assert read_record(pruned)["plan"]["stacks"][0]["kept"] == [5, 6, 7]

import sys
from vdit_quant.cli.main import main
sys.argv = ["vdit-quant", "shrunk", "two"]
main()
"""


@pytest.mark.slow
def test_the_files_in_the_guide_work(root: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    package = tmp_path / "src"
    shutil.copytree(root / "src", package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    files = PLUGIN.findall((root / "docs" / "extending.md").read_text(encoding="utf-8"))
    assert len(files) == 6
    for name, text in files:
        (package / "vdit_quant" / name).write_text(text, encoding="utf-8")
    path = [str(package), *filter(None, [environment.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", USE_PLUGINS],
        env={**environment, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 7  # 16 bits to 1.6, and a scale a row
