"""The table of the pruning benchmark follows from its JSON alone, and says nothing about what was not measured."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {
    "samples": 5000, "steps": 50, "guidance": 1.5, "latents": 50_000, "latent_steps": 25, "row_steps": 700,
    "row_batch": 512,
}  # fmt: skip
TEACHER = {"name": "teacher", "label": "full depth", "table": "headline", "distance": 2.06}
EVEN = {
    "name": "even-1", "label": "even", "table": "criteria", "options": {"seed": 1}, "kept": [0, 2, 4], "distance": 4.5,
    "losses": {"pruned": {"diffusion": 0.5}, "recovered": {"output": 0.0125}},
}  # fmt: skip
MARKS = "before\n<!-- quality:pruning:begin -->\n<!-- quality:pruning:end -->\nafter\n"


@pytest.fixture
def render(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))

    def run(rows: list[dict[str, Any]] | None) -> str:
        found, document = tmp_path / "pruning.json", tmp_path / "page.md"
        document.write_text(MARKS)
        if rows is not None:
            found.write_text(json.dumps({"model": "cifar-dit", "settings": SETTINGS, "rows": rows}))
        line = ["pruning.py", "--render", "--json", str(found), "--markdown", str(document)]
        monkeypatch.setattr(sys, "argv", line)
        importlib.import_module("pruning").main()
        return document.read_text()

    return run


def test_rows_are_rendered_from_the_file_alone(render: Callable[..., str]) -> None:
    text = render([TEACHER, EVEN, {"name": "even-0", "label": "even", "table": "criteria", "error": "OSError"}])
    assert "| full depth | all | 2.06 |" in text
    assert "| even | 1 | 0, 2, 4 | 0.5000 | 0.01250 | 4.50 |" in text
    assert "700 steps of 512 samples" in text
    assert "Failed: even-0." in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_nothing_is_said_without_figures(render: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"pruning\.json: no such file"):
        render(None)
    assert (tmp_path / "page.md").read_text() == MARKS
    assert "same recovery" not in render([TEACHER])


def test_every_region_is_in_the_page(root: Path) -> None:
    page = (root / "docs" / "methods" / "tinyfusion.md").read_text(encoding="utf-8")
    assert page.count("<!-- quality:pruning:begin -->") == page.count("<!-- quality:pruning:end -->") == 1
