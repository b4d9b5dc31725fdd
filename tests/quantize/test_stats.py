"""Statistics gathered piece by piece, moved, stored and merged are those of all rows at once."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vdit_quant.quantize.row_sample import ROWS
from vdit_quant.quantize.stats import LayerStats, merge

K = 24
NEEDS = frozenset({"gram", "rows"})


def _rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 5, K)


def _assert_same(got: LayerStats, want: LayerStats) -> None:
    assert got.count == want.count
    for name, tensor in want.to_tensors().items():
        torch.testing.assert_close(got.to_tensors()[name], tensor, rtol=1e-5, atol=1e-4, msg=name)


def test_streaming_equals_one_shot() -> None:
    x = _rows(100, 0)
    once, streamed = LayerStats.empty(K, NEEDS), LayerStats.empty(K, NEEDS)
    once.update(x, 0, 0)
    for part in x.split([1, 50, 9, 40]):
        streamed.update(part, 0, 0)
    _assert_same(streamed.finish(), once.finish())


def test_the_numbers_are_what_they_are_called() -> None:
    parts = {(b, branch): _rows(20, 10 * b + branch) for b in range(3) for branch in range(2)}
    stats = LayerStats.empty(K, NEEDS, bins=3)
    for (b, branch), x in parts.items():
        stats.update(x.bfloat16() if b == 1 else x, b, branch)
    stats.finish()
    seen = {key: (x.bfloat16().float() if key[0] == 1 else x) for key, x in parts.items()}
    everything = torch.cat(list(seen.values()))
    for (b, branch), x in seen.items():
        assert torch.equal(stats.absmax[b, branch], x.abs().amax(0))
    assert torch.equal(stats.channel_absmax(), everything.abs().amax(0))
    torch.testing.assert_close(stats.importance, everything.square().mean(0))
    torch.testing.assert_close(stats.gram, everything.T @ everything, rtol=1e-4, atol=1e-3)
    assert stats.count == 120


def test_merge_equals_concatenation() -> None:
    first, second, both = (LayerStats.empty(K, NEEDS, bins=2) for _ in range(3))
    for index in range(4):
        x = _rows(30, index)
        (first if index < 2 else second).update(x, index % 2, index // 2, keep=5)
        both.update(x, index % 2, index // 2, keep=5)
    merged, whole = merge(first.finish(), second.finish()), both.finish()
    _assert_same(replace(merged, rows=None), replace(whole, rows=None))
    assert merged.rows is not None
    assert whole.rows is not None
    assert len(merged.rows) == len(whole.rows) == 20


def test_merging_with_nothing_changes_nothing() -> None:
    stats = LayerStats.empty(K, NEEDS)
    stats.update(_rows(10, 0), 0, 1, keep=4)
    stats.finish()
    _assert_same(merge(stats, LayerStats.empty(K, NEEDS)), stats)


@pytest.mark.parametrize(("rows", "keep"), [(100, 16), (17, 16), (3, 16), (16, 16), (33, 16)])
def test_kept_rows_are_real_rows_spread_over_the_call(rows: int, keep: int) -> None:
    x = _rows(rows, 1)
    stats = LayerStats.empty(K, NEEDS)
    stats.update(x, 0, 0, keep=keep)
    kept = stats.finish().rows
    assert kept is not None
    assert len(kept) == min(rows, keep)
    positions = [int((x == row).all(1).nonzero()[0, 0]) for row in kept]
    assert positions == sorted(set(positions))
    assert positions[-1] >= (rows - 1) * (len(kept) - 1) // max(1, len(kept)) - rows // 3


def _drawn(calls: int, samples: int = 16, tokens: int = 64) -> LayerStats:
    """Of every row, what it is: its token, its sample, its call and its guidance branch; branches take turns."""
    stats = LayerStats.empty(4, NEEDS, bins=1)
    for call in range(calls):
        for branch in (0, 1):
            sample, token = torch.meshgrid(torch.arange(samples), torch.arange(tokens), indexing="ij")
            same = torch.ones(samples, tokens)
            x = torch.stack((token, sample, call * same, branch * same), -1).reshape(-1, 4)
            stats.update(x, 0, branch, keep=16)
    return stats


def test_kept_rows_are_of_all_tokens_whatever_the_batch() -> None:
    for samples in (1, 2, 16):
        rows = _drawn(20, samples).finish().rows
        assert rows is not None
        assert len(rows) == 20 * 2 * 16
        tokens = rows[:, 0].long().bincount(minlength=64)
        assert tokens.min() >= 5, "10 of each token, were they spread perfectly"
    again = _drawn(20, 16).finish().rows
    assert again is not None
    assert torch.equal(rows, again), "equal runs keep equal rows"


def test_kept_rows_are_bounded_and_stay_spread_over_calls_branches_samples_and_tokens() -> None:
    for calls in (80, 1000):
        rows = _drawn(calls).finish().rows
        assert rows is not None
        assert 0.7 * ROWS < len(rows) <= ROWS
        for column, size in enumerate((64, 16, calls, 2)):
            parts = (rows[:, column] * min(size, 8) / size).long().bincount(minlength=min(size, 8))
            assert parts.min() > 0.8 * len(rows) / len(parts), (calls, column, parts)


def test_a_clone_goes_its_own_way() -> None:
    stats = LayerStats.empty(K, NEEDS)
    stats.update(_rows(10, 0), 0, 0, keep=4)
    other = stats.clone()
    other.update(_rows(10, 1), 0, 0, keep=4)
    alone = LayerStats.empty(K, NEEDS)
    alone.update(_rows(10, 0), 0, 0, keep=4)
    _assert_same(stats.finish(), alone.finish())
    assert other.finish().rows is not None
    assert other.count == 20


def test_storing_and_moving_keep_everything() -> None:
    stats = LayerStats.empty(K, NEEDS, bins=2)
    stats.update(_rows(10, 0), 1, 1, keep=4)
    stats.finish()
    _assert_same(LayerStats.from_tensors(stats.to_tensors()), stats)
    _assert_same(stats.to("cpu"), stats)


def test_no_gram_unless_needed() -> None:
    stats = LayerStats.empty(K, frozenset({"second_moment"}))
    stats.update(_rows(10, 0), 0, 0)
    assert stats.finish().gram is None
    assert stats.rows is None
    assert set(stats.to_tensors()) == {"absmax", "second_moment", "count"}
