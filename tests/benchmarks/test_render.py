"""What the speed benchmarks publish, from made-up results, and that a compilation is never reused by mistake."""

import importlib
import re
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SETTING = {"machine": "A GPU", "versions": {"torch": "9.9"}, "forwards": 50}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, root: Path) -> Any:
    """Imports a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def denoiser(script: Any) -> ModuleType:
    module: ModuleType = script("denoiser_tables")
    return module


@pytest.fixture
def ways(script: Any) -> ModuleType:
    module: ModuleType = script("denoiser_ways")
    return module


@pytest.fixture
def scaling(script: Any) -> ModuleType:
    module: ModuleType = script("scaling")
    return module


def row(ms: float, distance: float | None = None) -> dict[str, Any]:
    checks = {} if distance is None else {"from_unfused": distance, "allowed": 0.02}
    sizes = {"weight_bytes": 2e9, "peak_bytes": None if ms < 5 else 3e9}
    return {"ms": ms, "error": 0.01, "first_call_s": 1.5, "attention": "cuDNN", **sizes, **checks}


def model(**more: Any) -> dict[str, Any]:
    rows = {
        "bf16-eager": row(24.0), "bf16-compiled": row(20.0), "bf16-compiled-cudnn": row(18.0),
        "bf16-compiled-graph": row(16.0), "w8a8": row(10.0, 0.01), "w8a8-graph": row(8.0, 0.015),
    }  # fmt: skip
    return {"label": "A model", **SETTING, "bf16_error": 0.01, "rows": rows, "failed": {}, **more}


def cells(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_coarse_codes_are_held_against_their_own_noise(denoiser: ModuleType) -> None:
    rows = {"bf16-compiled": row(20.0), "w4a4": {**row(11.0, 0.15), "allowed": 0.2}}
    text = denoiser.render({"models": {"a": model(rows=rows)}})
    assert "`w4a4`: 0.1000 with its own weights." in text
    assert "too far" not in text


def test_both_baselines_are_the_fastest_of_their_kind(denoiser: ModuleType) -> None:
    text = denoiser.render({"models": {"a": model()}})
    assert cells(text, "w8a8")[1:4] == ["10.00", "1.80", "1.60"]
    assert cells(text, "w8a8-graph")[1:4] == ["8.00", "2.25", "2.00"]
    assert cells(text, "bf16-compiled")[2] == "0.90"
    assert "A GPU; torch 9.9" in text
    assert "medians of 50 forwards" in text


def test_without_a_baseline_there_is_no_ratio(denoiser: ModuleType) -> None:
    text = denoiser.render({"models": {"a": model(rows={"w8a8": row(10.0, 0.01)})}})
    assert cells(text, "w8a8")[2:4] == ["-", "-"]


def test_a_way_that_failed_is_listed_with_its_reason(denoiser: ModuleType) -> None:
    text = denoiser.render({"models": {"a": model(failed={"torchao-int8": "RuntimeError: `_int_mm` refuses M = 2"})}})
    assert "- `torchao-int8` failed: `RuntimeError: '_int_mm' refuses M = 2`" in text


def test_a_way_too_far_from_its_unfused_reference_is_marked(denoiser: ModuleType) -> None:
    found = model(rows={"bf16-compiled": row(20.0), "w8a8": row(10.0, 0.021), "w4a8": row(11.0, float("nan"))})
    assert denoiser.disagreeing(found) == ["w8a8", "w4a8"]
    assert cells(denoiser.render({"models": {"a": found}}), "w8a8")[7] == "**0.0210**, too far"
    assert denoiser.disagreeing(model()) == []


def test_models_measured_apart_carry_their_own_caption(denoiser: ModuleType) -> None:
    other = model(versions={"torch": "9.8"})
    text = denoiser.render({"models": {"a": model(), "b": other, "c": model()}})
    assert text.count("torch 9.9") == 2
    assert text.count("torch 9.8") == 1


def test_the_marked_region_is_replaced_and_must_be_there(script: Any, tmp_path: Path) -> None:
    render, document = script("_render"), tmp_path / "page.md"
    document.write_text("before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n", encoding="utf-8")
    render.rewrite(document, "x", "new")
    assert document.read_text(encoding="utf-8") == "before\n<!-- x:begin -->\nnew\n<!-- x:end -->\nafter\n"
    render.rewrite(document, "x", "new", ("A plot", tmp_path / "images" / "x.png"))
    assert "\nnew\n\n![A plot](images/x.png)\n<!-- x:end -->" in document.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="y:begin"):
        render.rewrite(document, "y", "new")


def points() -> dict[str, Any]:
    fast = {"bf16": row(20.0), "bf16-cudnn": row(18.0), "w8a8": row(12.0, 0.01), "w4a8": row(15.0, 0.03)}
    slow = {"bf16": row(4.0), "w8a8": row(5.0, 0.01)}
    return {
        **SETTING,
        "points": [
            {"axis": "batch", "x": 1, "rows": slow, "failed": {"w4a8": "KeyError: no"}, "bf16_error": 0.01},
            {"axis": "batch", "x": 2, "rows": fast, "failed": {}, "bf16_error": 0.01},
            {"axis": "tokens", "x": 256, "rows": fast, "failed": {}, "bf16_error": 0.01},
        ],
    }


def test_scaling_compares_with_the_faster_baseline(scaling: ModuleType) -> None:
    text = scaling.render(points())
    assert cells(text, "1")[1:] == ["4.00", "5.00", "0.80", "failed", "-"]
    assert cells(text, "2")[1:] == ["18.00", "12.00", "1.50", "15.00", "1.20 (too far from unfused)"]
    assert "- batch 1, `w4a8`: `KeyError: no`" in text
    series = scaling.curves(points())[scaling.TITLES["batch"]]
    assert series == {"w8a8": [(1, 0.8), (2, 1.5)], "w4a8": [(2, 1.2)]}


def test_plots_are_pictures(denoiser: ModuleType, scaling: ModuleType, script: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    denoiser.plot({"models": {"a": model()}}, tmp_path / "bars.png")
    script("_render").plot_lines(scaling.curves(points()), "speed", tmp_path / "lines.png")
    for name in ("bars", "lines"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


class Attention(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)


def test_another_order_of_attention_back_ends_is_compiled_anew(ways: ModuleType) -> None:
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    module, q = Attention(), torch.randn(1, 2, 8, 16)
    order = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with torch.no_grad():
        ways.compile_anew(module, backend=count)(q)
        with sdpa_kernel(order, set_priority=True):
            ways.compile_anew(module, backend=count)(q)
    assert len(graphs) == 2


def test_the_blocks_of_a_model_share_one_compilation(ways: ModuleType) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Blocks()
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(ways.compile_blocks(model, backend=count)(x), expected)
    assert len(graphs) == 1


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            x = block(x)
        return x


def test_what_other_libraries_do_to_a_run_loses_nothing_of_it(script: Any, ways: ModuleType, monkeypatch: Any) -> None:
    """A library that fails is a row that says so; one that never ends leaves what was measured before."""
    denoiser = script("denoiser")

    class Bench:
        base, bf16_error = nn.Linear(2, 2), 0.01

        def prepare(self, way: str) -> Any:
            if way == "torchao-fp8":
                raise RuntimeError("no such kernel\nmore")
            return ways.Path_(way, self.base, lambda: torch.zeros(1), {})

    monkeypatch.setattr(ways.Bench, "of", lambda *_: Bench())
    monkeypatch.setattr(denoiser, "time_paths", lambda paths, rounds: {path.name: {"ms": 1.0} for path in paths})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    options = denoiser.arguments().parse_args(["--way", "torchao-fp8", "--way", "torchao-int8", "--way", "w8a8"])
    own, one, both = denoiser.measure_model("dit-xl-b2", options)
    failed = {"torchao-fp8": "RuntimeError: no such kernel"}
    assert (list(own["rows"]), own["failed"]) == (["w8a8"], {})
    assert (list(one["rows"]), one["failed"]) == (["w8a8"], failed)
    assert (list(both["rows"]), both["failed"]) == (["w8a8", "torchao-int8"], failed)
    monkeypatch.setattr(Bench, "prepare", lambda self, way: ways.Path_(way, self.base, None, {}, seconds=1.0))
    options = denoiser.arguments().parse_args(["--way", "w8a8", "--way", "w4a8", "--rounds", "2"])
    (short,) = denoiser.measure_model("dit-xl-b2", options, time.perf_counter() + 15)  # two rounds take 22 seconds
    assert (list(short["rows"]), short["failed"]) == (["w8a8"], {"w4a8": "no time was left"})


def test_a_document_is_looked_at_before_anything_is_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality, report = script("quality"), tmp_path / "report.md"
    monkeypatch.setattr(quality, "benchmark", lambda _: pytest.fail("measured first"))
    report.write_text("no marks", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["quality.py", "--json", str(tmp_path / "x.json"), "--markdown", str(report)])
    with pytest.raises(SystemExit, match="quality:demo:begin"):
        quality.main()
    report.unlink()  # a new one is made
    script("_render").rewrite(report, "quality:demo", "a table")
    assert report.read_text(encoding="utf-8") == "<!-- quality:demo:begin -->\na table\n<!-- quality:demo:end -->\n"


def test_every_recipe_of_the_speed_tables_can_be_made(script: Any, ways: ModuleType) -> None:
    models = script("random_models")
    shape = models.dit_xl()
    shape = replace(shape, config={**shape.config, "num_layers": 1, "num_attention_heads": 8, "attention_head_dim": 16})
    model, call = models.build(shape, torch.float32, "cpu"), models.inputs(shape, 1, torch.float32, "cpu")
    with torch.no_grad():
        expected = model(**call)[0]
        errors = {name: ways.relative(models.compressed(model, name)(**call)[0], expected) for name in ways.RECIPES}
    assert all(0 < error < 0.2 for error in errors.values()), errors


def test_the_commands_of_the_page_on_speed_need_no_more_than_they_say(
    script: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = set(re.findall(r"python benchmarks/(\w+)\.py", (root / "docs" / "benchmarks.md").read_text("utf-8")))
    assert named >= {"attention", "denoiser", "gemm", "producers", "scaling"}
    monkeypatch.chdir(root)
    for name in sorted(named):
        monkeypatch.setattr("sys.argv", [name, "--render"])  # measures nothing, prints the table of the shipped figures
        script(name).main()
