"""The pages hold together: links lead somewhere, and tables of parameters say what the code says."""

import re
from pathlib import Path

import pytest

from vdit_quant.quantize import methods, registry

LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
# parameters and their defaults; the table of several methods has a column for the method before them
ROW = re.compile(r"^\| (?:(?:`\w+` )?\| )?((?:`\w+`(?:, )?)+) \| ((?:`[^`]+`(?:, )?)+) \|", re.MULTILINE)
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)


def pages(root: Path) -> list[Path]:
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """What its headings are called in links: lower case, without punctuation, a hyphen for each space."""
    headings = re.findall(r"^#+ +(.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower())) for heading in headings}


def broken_links(page: Path) -> list[str]:
    found = []
    for path, anchor in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(f"{page.name}: {path}#{anchor}")
    return found


def test_every_link_leads_somewhere(root: Path) -> None:
    assert [link for page in pages(root) for link in broken_links(page)] == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n[good](#a-b-c) [gone](other.md) [bad](page.md#d)\n```\n[code](nowhere.md)\n```\n")
    assert broken_links(page) == ["page.md: other.md#", "page.md: page.md#d"]


def test_the_first_page_leads_to_all_others(root: Path) -> None:
    docs = root / "docs"
    linked = {path for path, _ in LINK.findall((docs / "index.md").read_text(encoding="utf-8"))}
    assert {str(page.relative_to(docs)) for page in docs.rglob("*.md")} - {"index.md"} <= linked


@pytest.mark.parametrize("name", registry.names(methods))
def test_a_page_gives_the_defaults_of_its_method(name: str, root: Path) -> None:
    page, method = root / "docs" / "methods" / f"{name}.md", registry.find(methods, name, "METHOD")
    text = page.read_text(encoding="utf-8") if page.exists() else (root / "docs" / "recipes.md").read_text("utf-8")
    told: dict[str, str] = {}
    for names, defaults in ROW.findall(text):
        told |= dict(zip(re.findall(r"\w+", names), re.findall(r"`([^`]+)`", defaults), strict=False))
    for key, default in method.defaults.items():
        assert told.get(key) == (str(default).lower() if isinstance(default, bool) else str(default)), key
