"""Pictures of bit plans: the numbers behind them, that they are drawn, and the message where they cannot be."""

import sys
from pathlib import Path

import pytest

from vdit_quant.evaluate.plan_plot import error_curves, plan_shares, plot_curves, plot_plan
from vdit_quant.quantize.allocate import Candidate, LayerCandidates, allocate
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.layer import layer_bytes
from vdit_quant.quantize.spec import LayerSpec

BLOCKS = ["blocks.0", "blocks.1"]
ROLES = {"blocks.0.attn": "attention", "blocks.0.ff": "feed_forward", "blocks.1.ff": "feed_forward", "out": "other"}
SHAPES = dict.fromkeys(ROLES, (128, 64))


@pytest.fixture
def table() -> list[LayerCandidates]:
    def candidate(spec: str, error: float) -> Candidate:
        return Candidate(spec, layer_bytes(128, 64, LayerSpec.parse(spec)), error)

    return [
        LayerCandidates(name, 128 * 64, (candidate("w4g64", 10.0**-i), candidate("w8", 10.0 ** -(i + 2))))
        for i, name in enumerate(ROLES)
    ]


def test_curves_leave_out_what_cannot_be_met_and_the_milp_is_lowest(table: list[LayerCandidates]) -> None:
    curves = error_curves(table, ["2bits", "7bits", "9bits"])
    assert [len(points) for points in curves.values()] == [2, 2, 2]
    for (_, best), (_, greedy), (_, single) in zip(*curves.values(), strict=True):
        assert best <= greedy <= single
    with pytest.raises(InputError, match="cannot be read"):
        error_curves(table, ["much"])


def test_shares_count_weights_and_true_bits_by_role_and_block(table: list[LayerCandidates]) -> None:
    plan = allocate(table, "7bits")
    shares = plan_shares(plan, ROLES, SHAPES, BLOCKS)
    assert set(shares) == {
        ("attention", "blocks.0"), ("feed_forward", "blocks.0"), ("feed_forward", "blocks.1"), ("other", ""),
    }  # fmt: skip
    assert shares["attention", "blocks.0"] == {"weights": {"w8": 128 * 64}, "bits": 8.5}
    with pytest.raises(InputError, match="not in this model"):
        plan_shares(plan, {}, SHAPES, BLOCKS)


def test_pictures_are_drawn_where_matplotlib_is(table: list[LayerCandidates], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_plan(allocate(table, "7bits"), ROLES, SHAPES, BLOCKS, tmp_path / "new" / "plan.png")
    plot_curves(error_curves(table, [7, 9]), tmp_path / "curve.png")
    for name in ("new/plan.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot_curves({}, tmp_path / "curve.png")
