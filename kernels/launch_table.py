"""Measured launch options for each GPU: one JSON file a GPU, read once, never measured at run time.

    {"version": 1, "device": "NVIDIA H200", "versions": {"triton": "3.6.0"},
     "ops": {"int8_linear": [{"m": 4096, "n": 4608, "k": 1152, "options": {"BM": 128}, "us": 41.5}]}}

`m` is a bucket (`bucket`), n and k are exact, `facts` holds what else the choice depends on. The file is named after
the GPU (`slug`). A file in `dispatch.table_folder()` replaces, entry by entry, the one that ships in `configs/`, and
both that of a GPU's sibling (`SIBLINGS`). What no entry covers is launched by the heuristics of the kernel's own file.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import dispatch
from .dispatch import SettingError

logger = logging.getLogger("vdit_quant")

VERSION = 1
SHIPPED = Path(__file__).parent / "configs"
SIBLINGS = {"nvidia-h100-80gb-hbm3": "nvidia-h200"}
"""GPU -> one of the same processors, as many and as large, whose tables serve it too. The SXM form of the H100 differs
from an H200 in its memory alone; its other forms have fewer processors."""
REACH = 2.0
"""An entry serves buckets up to this factor away when its own shape has none nearer."""

Options = dict[str, Any]
Facts = tuple[tuple[str, int | str], ...]
Key = tuple[str, int, int, Facts]

_forced: ContextVar[tuple[str, Mapping[str, Any]] | None] = ContextVar("vdit_quant_launch_options", default=None)


@dataclass(frozen=True)
class Entry:
    """Launch options for one op and one shape, with the time that they were chosen for, in microseconds."""

    op: str
    m: int
    n: int
    k: int
    options: Mapping[str, Any]
    facts: Facts = ()
    us: float | None = None

    @property
    def key(self) -> Key:
        return self.op, self.n, self.k, self.facts


@dataclass(frozen=True)
class Table:
    """The entries for one GPU, by op, shape and facts, then by bucket."""

    device: str
    entries: Mapping[Key, Mapping[int, Entry]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, device: str, entries: Iterable[Entry], versions: Mapping[str, str] | None = None) -> "Table":
        """A table of these entries; of two for the same bucket the later one counts."""
        found: dict[Key, dict[int, Entry]] = {}
        for entry in entries:
            found.setdefault(entry.key, {})[entry.m] = entry
        return cls(device, found, dict(versions or {}))

    def rows(self) -> list[Entry]:
        """Every entry."""
        return [entry for by_bucket in self.entries.values() for entry in by_bucket.values()]

    def find(self, op: str, m: int, n: int, k: int, facts: Facts = ()) -> Entry | None:
        """The entry of the nearest bucket within `REACH`; of two equally near ones the larger."""
        buckets = self.entries.get((op, n, k, facts), {})
        wanted = bucket(m)
        near = [b for b in buckets if max(b / wanted, wanted / b) <= REACH]
        return buckets[min(near, key=lambda b: (max(b / wanted, wanted / b), -b))] if near else None


def bucket(m: int) -> int:
    """The smallest power of two, or midpoint of two, that is not below m: 1, 2, 3, 4, 6, 8, 12, 16, ...

    Raises ValueError when m is not positive.
    """
    if m < 1:
        raise ValueError(f"a launch table has no bucket for m = {m}")
    power = 1 << (m - 1).bit_length()
    return power * 3 // 4 if power >= 4 and m <= power * 3 // 4 else power


def slug(device_name: str) -> str:
    """Name of a GPU's table file: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def facts_of(facts: Mapping[str, int | str]) -> Facts:
    """Facts in the one order that entries are compared in."""
    return tuple(sorted(facts.items()))


def lookup(op: str, device: torch.device, m: int, n: int, k: int, **facts: int | str) -> Options | None:
    """The measured launch options of `op` for this shape on `device`, a copy; None where nothing was measured.

    Raises SettingError when the GPU's table is malformed.
    """
    if (chosen := _forced.get()) is not None and chosen[0] == op:
        return dict(chosen[1])
    entry = _find(op, device, bucket(m), n, k, facts_of(facts))
    return None if entry is None else dict(entry.options)


@contextmanager
def forced(op: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Inside a `with` block, in this thread, `lookup` gives these options for `op` whatever the tables say."""
    token = _forced.set((op, options))
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced(op: str) -> bool:
    """Whether a `forced` block holds for `op` here."""
    return (chosen := _forced.get()) is not None and chosen[0] == op


@cache
def _find(op: str, device: torch.device, m: int, n: int, k: int, facts: Facts) -> Entry | None:
    for table, _ in _tables(_device_slug(device)):
        if (entry := table.find(op, m, n, k, facts)) is not None:
            return entry
    return None


@cache
def _device_slug(device: torch.device) -> str:
    return slug(torch.cuda.get_device_name(device)) if device.type == "cuda" and torch.cuda.is_available() else ""


@cache
def _tables(name: str) -> tuple[tuple[Table, Path], ...]:
    """The tables that serve one GPU: the user's own first, those of its sibling last."""
    names = [name, *filter(None, [SIBLINGS.get(name)])] if name else []
    folders = [*_own_folder(name), SHIPPED]
    paths = [folder / f"{each}.json" for each in names for folder in folders]
    return tuple((read_table(path), path) for path in paths if path.is_file())


def _own_folder(name: str) -> list[Path]:
    """The user's; none where it cannot be looked into, which is no reason to run no kernel."""
    try:
        folder = dispatch.table_folder()
        (folder / f"{name}.json").is_file()
    except (OSError, SettingError) as error:
        logger.warning("launch tables that `vdit-quant tune` may have written are not read: %s", error)
        return []
    return [folder]


def reload() -> None:
    """Forget what was read, so that new files count."""
    for cached in (_find, _device_slug, _tables):
        cached.cache_clear()


def in_use(device: torch.device) -> str:
    """Which tables serve `device`, in words."""
    name = _device_slug(device)
    tables = _tables(name)
    if not tables:
        return "none for this GPU: heuristics (`vdit-quant tune` measures one)"
    words = []
    for table, path in tables:
        origin = "" if path.stem == name else f", measured on {table.device}"
        words.append(f"{path} ({len(table.rows())} entries{origin})")
    return ", then ".join(words)


def read_table(path: Path) -> Table:
    """Read one file. Raises SettingError naming the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["version"]
        if version != VERSION:
            raise ValueError(f"expected version {VERSION}, found {version}")
        entries = [_entry(op, row) for op, rows in data["ops"].items() for row in rows]
        return Table.of(str(data["device"]), entries, data.get("versions"))
    except KeyError as error:
        raise SettingError(f"launch table {path}: the key {error} is missing") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SettingError(f"launch table {path}: {error}") from None


def _entry(op: str, row: Mapping[str, Any]) -> Entry:
    where = f"{op} m={row['m']} n={row['n']} k={row['k']}"
    sizes = {name: row[name] for name in ("m", "n", "k")}
    if any(not isinstance(size, int) or size < 1 for size in sizes.values()):
        raise ValueError(f"{where}: expected positive integers")
    if bucket(row["m"]) != row["m"]:
        raise ValueError(f"{where}: m is not a bucket; the next one is {bucket(row['m'])}")
    options = row["options"]
    if not isinstance(options, dict) or not all(isinstance(v, int | str | bool) for v in options.values()):
        raise ValueError(f"{where}: expected options of integers, words and booleans, found {options!r}")
    return Entry(op, **sizes, options=options, facts=facts_of(row.get("facts", {})), us=row.get("us"))


def write_table(path: Path, table: Table) -> None:
    """Write a table, one entry a line, sorted; the file is complete or not there."""
    ops: dict[str, list[str]] = {}
    for entry in sorted(table.rows(), key=lambda e: (e.op, e.facts, e.n, e.k, e.m)):
        row: dict[str, Any] = {"m": entry.m, "n": entry.n, "k": entry.k}
        row |= {"facts": dict(entry.facts)} if entry.facts else {}
        row |= {"options": dict(entry.options)}
        row |= {} if entry.us is None else {"us": round(entry.us, 2)}
        ops.setdefault(entry.op, []).append("   " + json.dumps(row))
    head = {"version": VERSION, "device": table.device, "versions": dict(table.versions)}
    body = ",\n".join(f'  "{op}": [\n' + ",\n".join(rows) + "\n  ]" for op, rows in ops.items())
    text = json.dumps(head)[:-1] + ',\n "ops": {\n' + body + "\n }}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
