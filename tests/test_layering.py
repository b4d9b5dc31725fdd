"""Imports only go left: kernels < quantize < runtime < evaluate < calibrate < prune < cli."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


def _targets(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, folder that a relative import leads to) for every relative import, those in functions included."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.parents[node.level - 1].parts
        names = [node.module] if node.module else [alias.name for alias in node.names]
        for name in names:
            yield node.lineno, (*base, *name.split("."))[0]


def _violations(path: Path, tree: ast.Module, layers: tuple[str, ...]) -> list[str]:
    own = layers.index(path.parts[0])
    return [
        f"{path}:{line} imports {target}"
        for line, target in _targets(path, tree)
        if target in layers and layers.index(target) > own
    ]


def test_no_import_leads_to_a_higher_layer(package_sources: dict[Path, ast.Module], layers: tuple[str, ...]) -> None:
    found = [
        text
        for path, tree in package_sources.items()
        if path.parts[0] in layers
        for text in _violations(path, tree, layers)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/int8.py", "from ..runtime import linear"),
        ("quantize/formats/int4.py", "from ...cli import console"),
        ("quantize/spec.py", "from .. import cli"),
        ("runtime/load.py", "def load():\n    from ..calibrate.pipeline import compress"),
    ],
)
def test_the_check_itself_sees_an_upward_import(path: str, line: str, layers: tuple[str, ...]) -> None:
    assert _violations(Path(path), ast.parse(line), layers)
