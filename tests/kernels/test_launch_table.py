import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from vdit_quant.kernels import dispatch, launch_table
from vdit_quant.kernels.launch_table import Entry, Table, bucket, facts_of, lookup, read_table, slug, write_table

GPU = torch.device("cuda", 0)


def entry(m: int, bm: int, n: int = 4608, k: int = 1152, op: str = "int8_linear", **facts: int) -> Entry:
    return Entry(op, m, n, k, {"BM": bm, "num_warps": 4}, facts_of(facts), us=1.25)


@pytest.fixture
def tables(monkeypatch, tmp_path: Path):
    """Pretend that this machine has an NVIDIA H200, with a shipped and a user folder of its own."""
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    monkeypatch.setattr(launch_table, "SHIPPED", shipped)
    monkeypatch.setenv("VDIT_LAUNCH_TABLES", str(own))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    launch_table.reload()
    yield shipped / "nvidia-h200.json", own / "nvidia-h200.json"
    launch_table.reload()


def test_buckets_are_powers_of_two_and_their_midpoints() -> None:
    assert sorted({bucket(m) for m in range(1, 100)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    for m in range(1, 5000):
        assert m <= bucket(m) <= max(1.5 * m, m + 1)
        assert bucket(bucket(m)) == bucket(m)
        power = 2 ** math.floor(math.log2(bucket(m)))
        assert bucket(m) in (power, power * 3 // 2)
    with pytest.raises(ValueError, match="no bucket for m = 0"):
        bucket(0)


def test_slugs() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
    assert slug("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"


def test_a_table_survives_the_file_and_is_one_entry_a_line(tmp_path: Path) -> None:
    entries = [entry(4096, 128), entry(64, 64), entry(1, 16, op="int8_weight_linear"), entry(4096, 32, group=64)]
    path = tmp_path / "deep" / "t.json"
    write_table(path, Table.of("NVIDIA H200", entries, {"triton": "3.6.0"}))
    back = read_table(path)
    assert (back.device, back.versions) == ("NVIDIA H200", {"triton": "3.6.0"})
    assert sorted(back.rows(), key=repr) == sorted(entries, key=repr)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum('"BM"' in line for line in lines) == 4
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]


def test_the_nearest_bucket_within_a_factor_of_two_serves() -> None:
    table = Table.of("x", [entry(1024, 64), entry(4096, 128)])
    found = {m: (e.options["BM"] if (e := table.find("int8_linear", m, 4608, 1152)) else None) for m in range(1, 20000)}
    assert [found[m] for m in (1, 384, 512, 1024, 1536, 2048, 4096, 8192, 8193)] == [
        None, None, 64, 64, 64, 128, 128, 128, None,
    ]  # fmt: skip
    assert table.find("int8_linear", 1024, 4608, 1153) is None
    assert table.find("int8_linear", 1024, 4608, 1152, facts_of({"group": 64})) is None
    assert table.find("int4_linear", 1024, 4608, 1152) is None


def test_lookup_prefers_the_users_file_entry_by_entry(tables) -> None:
    shipped, own = tables
    assert lookup("int8_linear", GPU, 4000, 4608, 1152) is None
    write_table(shipped, Table.of("NVIDIA H200", [entry(4096, 128), entry(64, 64)]))
    write_table(own, Table.of("NVIDIA H200", [entry(4096, 256)]))
    launch_table.reload()
    assert lookup("int8_linear", GPU, 4000, 4608, 1152) == {"BM": 256, "num_warps": 4}
    assert lookup("int8_linear", GPU, 50, 4608, 1152) == {"BM": 64, "num_warps": 4}
    assert "own" in launch_table.in_use(GPU)
    assert lookup("int8_linear", torch.device("cpu"), 4000, 4608, 1152) is None


def test_a_folder_that_cannot_be_looked_into_is_passed_over_and_logged(tables, monkeypatch, caplog) -> None:
    write_table(tables[0], Table.of("NVIDIA H200", [entry(4096, 128)]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")  # has a sibling

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for folder, said in (("x" * 300, "File name too long"), ("", "no home directory")):
        monkeypatch.setenv("VDIT_LAUNCH_TABLES", folder)
        monkeypatch.setattr(Path, "home", no_home)
        launch_table.reload()
        caplog.clear()
        assert lookup("int8_linear", GPU, 4096, 4608, 1152) == {"BM": 128, "num_warps": 4}
        assert lookup("int8_linear", GPU, 64, 4608, 1152) is None
        (record,) = caplog.records
        assert said in record.getMessage()


def test_a_sibling_serves_what_a_gpu_has_no_entry_of_its_own_for(tables, monkeypatch) -> None:
    shipped, own = tables
    write_table(shipped, Table.of("NVIDIA H200", [entry(4096, 128), entry(64, 64)]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    launch_table.reload()
    assert lookup("int8_linear", GPU, 4096, 4608, 1152) == {"BM": 128, "num_warps": 4}
    told = f"{shipped} (2 entries, measured on NVIDIA H200)"
    assert launch_table.in_use(GPU) == told
    mine = own.with_stem("nvidia-h100-80gb-hbm3")
    write_table(mine, Table.of("NVIDIA H100 80GB HBM3", [entry(4096, 256)]))
    launch_table.reload()
    assert lookup("int8_linear", GPU, 4096, 4608, 1152) == {"BM": 256, "num_warps": 4}
    assert lookup("int8_linear", GPU, 64, 4608, 1152) == {"BM": 64, "num_warps": 4}
    assert launch_table.in_use(GPU) == f"{mine} (1 entries), then {told}"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 PCIe")
    launch_table.reload()
    assert lookup("int8_linear", GPU, 4096, 4608, 1152) is None
    assert launch_table.in_use(GPU).startswith("none for this GPU")


def test_what_lookup_gives_is_the_callers_own(tables) -> None:
    write_table(tables[0], Table.of("NVIDIA H200", [entry(64, 64)]))
    options = lookup("int8_linear", GPU, 64, 4608, 1152)
    options["BM"] = 1
    assert lookup("int8_linear", GPU, 64, 4608, 1152)["BM"] == 64


def test_options_can_be_forced_for_one_op() -> None:
    with launch_table.forced("int8_linear", {"BM": 7}):
        assert lookup("int8_linear", torch.device("cpu"), 1, 1, 1) == {"BM": 7}
        assert lookup("int4_to_int8", torch.device("cpu"), 1, 1, 1) is None
    assert lookup("int8_linear", torch.device("cpu"), 1, 1, 1) is None


ROW = {"m": 64, "n": 16, "k": 16, "options": {"BM": 64}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ({"version": 2, "device": "x", "ops": {}}, "expected version 1, found 2"),
        ({"version": 1, "device": "x"}, "the key 'ops' is missing"),
        ({"version": 1, "device": "x", "ops": {"a": [{"m": 1}]}}, "the key 'n' is missing"),
        ({"version": 1, "device": "x", "ops": {"a": [{**ROW, "m": 65}]}}, "a m=65 n=16 k=16: m is not a bucket"),
        ({"version": 1, "device": "x", "ops": {"a": [{**ROW, "n": 0}]}}, "expected positive integers"),
        (
            {"version": 1, "device": "x", "ops": {"a": [{**ROW, "options": {"BM": [1]}}]}},
            "expected options of integers",
        ),
        ({"version": 1, "device": "x", "ops": {"a": [7]}}, "not subscriptable"),
    ],
)
def test_a_malformed_file_is_one_error_that_names_it(text, message: str, tables) -> None:
    tables[1].parent.mkdir()
    tables[1].write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    with pytest.raises(dispatch.SettingError, match=message) as caught:
        lookup("int8_linear", GPU, 64, 16, 16)
    assert str(tables[1]) in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tables, monkeypatch) -> None:
    write_table(tables[0], Table.of("NVIDIA H200", [entry(64, 64)]))
    before = tables[0].read_text(encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_table(tables[0], Table.of("NVIDIA H200", []))
    assert tables[0].read_text(encoding="utf-8") == before
    assert len(list(tables[0].parent.iterdir())) == 1


@pytest.mark.parametrize("path", sorted((Path(launch_table.__file__).parent / "configs").glob("*.json")), ids=str)
def test_shipped_tables_are_sound(path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    hopper = importlib.import_module("vdit_quant.kernels._triton.hopper")
    table = read_table(path)
    assert slug(table.device) == path.stem
    for found in table.rows():
        if found.options.get("variant") == "hopper":  # `candidates` offers these on such a GPU only
            tiles = hopper.ADDED if found.op == "int8_linear_add" else hopper.STORED
            assert {**found.options, "GROUP_M": 0} in [{**tile, "GROUP_M": 0} for tile in tiles]
            continue
        allowed = {frozenset(c) for c in dispatch.twin(found.op).candidates(found.op, found.m, found.n, found.k)}
        assert frozenset(found.options) in allowed
