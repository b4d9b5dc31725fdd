"""Captured training steps: every batch is trained on once, with the numbers of a step that is not captured."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from vdit_quant.calibrate import captured_step
from vdit_quant.calibrate.captured_step import LIMIT, WARMUP, CapturedStep


class Trainer:
    """Least squares by Adam; counts the batches that its weights have seen."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3).to(device)
        self.seen = torch.zeros((), device=device)
        capturable = device != "cpu"
        self.optimizer = torch.optim.Adam(
            self.layer.parameters(), torch.tensor(0.01, device=device), capturable=capturable
        )

    def step(self, batch: tuple[Tensor, Tensor, str]) -> None:
        x, y, reduction = batch
        loss = nn.functional.mse_loss(self.layer(x), y, reduction=reduction)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.seen += len(x)


def batches(device: str, rows: tuple[int, ...]) -> list[tuple[Tensor, Tensor, str]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 6, generator=draw).to(device), torch.randn(n, 3, generator=draw).to(device), "sum")
        for n in rows
    ]


def test_on_a_cpu_every_batch_is_trained_on_once() -> None:
    trainer = Trainer("cpu")
    run = CapturedStep(trainer.step)
    for batch in batches("cpu", (4,) * 9):
        run(batch)
    assert trainer.seen == 36
    assert run.captures == 0


def test_a_step_that_cannot_be_captured_runs_as_it_is_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no copies while a stream is captured\nand more")

    captured_step._report.cache_clear()
    monkeypatch.setattr(captured_step, "capture_key", lambda *_: "a batch")
    monkeypatch.setattr(captured_step, "aside", nullcontext)
    monkeypatch.setattr(captured_step, "capture_call", refuse)
    for _ in range(2):
        trainer, plain = Trainer("cpu"), Trainer("cpu")
        run = CapturedStep(trainer.step)
        for batch in batches("cpu", (4,) * (WARMUP + 3)):
            run(batch)
            plain.step(batch)
        assert torch.equal(trainer.layer.weight, plain.layer.weight)
    assert [record.getMessage() for record in caplog.records] == [
        "training steps run without CUDA graphs: no copies while a stream is captured"
    ]


@pytest.mark.gpus(1)
@pytest.mark.parametrize("device", ["cuda", pytest.param("cuda:1", marks=pytest.mark.gpus(2))])
def test_captured_steps_train_as_plain_ones_do(device: str) -> None:
    trainer, plain = Trainer(device), Trainer(device)
    run = CapturedStep(trainer.step)
    for batch in batches(device, (4, 7) * 8):
        run(batch)
        plain.step(batch)
    torch.testing.assert_close(trainer.layer.weight, plain.layer.weight, rtol=1e-5, atol=1e-6)
    assert trainer.seen == plain.seen == 88
    assert run.captures == 2


@pytest.mark.gpus(1)
def test_beyond_the_limit_no_more_graphs_are_kept() -> None:
    trainer = Trainer("cuda")
    run = CapturedStep(trainer.step)
    kinds = tuple(range(1, LIMIT + 3))
    for batch in batches("cuda", kinds * (WARMUP + 2)):
        run(batch)
    assert run.captures == LIMIT
    assert trainer.seen == sum(kinds) * (WARMUP + 2)
