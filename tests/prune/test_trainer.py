"""The training loop: schedules that do not depend on how a run is split, moving averages, and a stop at NaN."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vdit_quant.calibrate.workspace import Workspace
from vdit_quant.prune.budget import Duration
from vdit_quant.prune.distill import Distillation, Recovery, feature_loss, within
from vdit_quant.prune.diverged import Diverged
from vdit_quant.prune.objective import Batch
from vdit_quant.prune.plan import PrunePlan, StackPlan
from vdit_quant.prune.plot import sparkline
from vdit_quant.prune.stream import Stream
from vdit_quant.prune.student import build_student
from vdit_quant.prune.trainer import Group, Listener, Moment, Trainer, Training
from vdit_quant.quantize.errors import InputError

PLAN = PrunePlan((StackPlan("transformer_blocks", "num_layers", 6, (0, 2, 5)),))
NEVER = Listener()


class Killed(Exception):
    """The process ends here."""


@pytest.fixture
def recovery(dit: Any, stream: Stream, tmp_path: Path) -> Callable[..., tuple[Any, Trainer, Recovery]]:
    """A student of `dit` with its trainer: a new one each time, as a new process would make it."""
    workspace = Workspace(tmp_path / "out")
    workspace.open({}, False)

    def make(name: str = "recovery", **options: Any) -> tuple[Any, Trainer, Recovery]:
        student = build_student(dit, PLAN)
        loss = Recovery(student, dit, PLAN.feature_pairs(), options.pop("distillation", Distillation()))
        settings = Training(**{"duration": Duration(steps=12), "save_steps": 4, **options})
        groups = [Group(1e-3, dict(student.named_parameters()))]
        trainer = Trainer(name, groups, loss, stream, settings, {"teacher": dit, "student": student}, workspace)
        return student, trainer, loss

    return make


def _kill_at(step: int) -> Listener:
    def stop(done: int, _total: int) -> None:
        if done == step:
            raise Killed

    return Listener(on_step=stop)


def test_a_run_in_pieces_gives_the_bits_of_a_run_in_one(recovery: Callable[..., Any]) -> None:
    whole, trainer, loss = recovery("recovery")
    with loss:
        trainer.run(NEVER)
    want, averages = whole.state_dict(), trainer.averages
    trainer.workspace.remove()
    trainer.workspace.open({}, False)
    for kill in (3, 6, 11):  # nothing saved yet, between two checkpoints, in the middle of what follows
        _, trainer, loss = recovery("recovery")
        with loss, pytest.raises(Killed):
            trainer.run(_kill_at(kill))
    student, trainer, loss = recovery("recovery")
    with loss:
        trainer.run(NEVER)
    assert trainer.step == 12
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    assert all(map(torch.equal, trainer.averages, averages))
    assert [entry["step"] for entry in trainer.log.entries] == list(range(1, 13))


def test_a_damaged_checkpoint_is_refused_by_name(recovery: Callable[..., Any]) -> None:
    _, trainer, loss = recovery()
    with loss, pytest.raises(Killed):
        trainer.run(_kill_at(5))
    checkpoint = trainer.workspace.folder / "recovery.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    _, trainer, loss = recovery()
    with loss, pytest.raises(InputError, match=r"recovery\.safetensors: .* delete it"):
        trainer.run(NEVER)


def test_the_loss_is_what_the_paper_says(recovery: Callable[..., Any], stream: Stream) -> None:
    student, _, loss = recovery(distillation=Distillation(output=0.75, features=0.3, mask=2.0))
    batch = stream.batch("recovery", 0)
    with loss:
        parts = loss(batch, Moment(3, 4, torch.Generator()))
    out, want = batch.predict(student), batch.predict(loss.teacher)
    torch.testing.assert_close(parts["diffusion"], (out - batch.target).square().mean())
    torch.testing.assert_close(parts["output"], (out - want).square().mean())
    beta = 0.3 * (1 - 3 / 4)
    total = 0.25 * parts["diffusion"] + 0.75 * parts["output"] + beta * parts["features"]
    torch.testing.assert_close(parts["loss"], total)
    assert loss.pairs == {f"transformer_blocks.{i}": f"transformer_blocks.{j}" for i, j in enumerate((1, 4, 5))}


def test_masked_features_ignore_massive_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(2, 16, 32, generator=generator)
    ours = theirs + 0.1 * torch.randn(2, 16, 32, generator=generator)
    plain = feature_loss(ours, theirs, 2.0)
    assert float(plain) == pytest.approx(0.01 / 0.77, rel=0.5)
    theirs[0, 3, 5], ours[0, 3, 5] = 4000.0, 3000.0
    assert feature_loss(ours, theirs, 2.0) < 3 * plain
    assert float(feature_loss(ours[:1], theirs[:1], None)) == pytest.approx(0.25**2, rel=0.01), "one number decides"
    assert not within(theirs, 2.0)[0, 3, 5]
    assert within(theirs, 2.0)[1].float().mean() == pytest.approx(0.954, abs=0.03)


def test_plain_fine_tuning_never_asks_the_teacher(recovery: Callable[..., Any], stream: Stream) -> None:
    _, _, loss = recovery(distillation=Distillation(0.0, 0.0, None))
    loss.teacher.forward = None
    with loss:
        parts = loss(stream.batch("recovery", 0), Moment(0, 4, torch.Generator()))
    assert set(parts) == {"loss", "diffusion"}
    torch.testing.assert_close(parts["loss"], parts["diffusion"])


def test_micro_batches_give_the_gradient_of_the_whole(recovery: Callable[..., Any]) -> None:
    gradients = []
    for micro in (None, 3):
        _, trainer, loss = recovery(micro=micro, distillation=Distillation(0.8, features=0.5))
        with loss:
            trainer._gradients(Moment(1, 12, torch.Generator()))
        gradients.append({name: p.grad for name, p in trainer.named.items() if p.grad is not None})
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, atol=1e-6, rtol=1e-3, msg=name)


def test_averages_follow_their_definition(recovery: Callable[..., Any]) -> None:
    student, trainer, loss = recovery(ema=0.5)
    name, parameter = next(iter(student.named_parameters()))
    want, seen = parameter.detach().clone(), []

    def follow(step: int, _total: int) -> None:
        seen.append(min(0.5, (step - 1) / (step + 9)))
        want.lerp_(parameter.detach(), 1 - seen[-1])

    with loss:
        trainer.run(Listener(on_step=follow))
    torch.testing.assert_close(trainer.averages[0], want)
    assert seen[0] == 0
    last = parameter.detach().clone()
    with trainer.averaged():
        assert torch.equal(parameter, trainer.averages[0])
        assert not torch.equal(parameter, last), name
    assert torch.equal(parameter, last)


def test_the_rate_rises_and_falls(recovery: Callable[..., Any]) -> None:
    _, trainer, loss = recovery(warmup=2, duration=Duration(steps=20))
    with loss:
        trainer.run(NEVER)
    rates = [entry["lr"] for entry in trainer.log.entries]
    assert rates[0] < rates[1]
    assert max(rates) <= 1e-3
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 * (0.02 + 0.98 * (1 + math.cos(math.pi * 19 / 20)) / 2))


@pytest.mark.parametrize("where", ["weight", "gradient", "teacher"])
def test_nan_stops_with_step_layer_and_the_last_good_state(
    where: str, recovery: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, trainer, loss = recovery()
    layer: Any = student.transformer_blocks[1].ff.net[2]
    bad: Any = loss.teacher.transformer_blocks[4].attn1.to_v if where == "teacher" else layer

    def poison(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if trainer.step < 5:
            return None
        if where == "gradient":
            output.register_hook(lambda grad: grad * float("nan"))
            return None
        return output * float("inf")

    bad.register_forward_hook(poison)
    named = {"weight": "student.transformer_blocks.1.ff.net.2", "teacher": "teacher.transformer_blocks.4.attn1.to_v"}
    with loss, pytest.raises(Diverged, match="recovery stopped at step 6 of 12") as error:
        trainer.run(NEVER)
    assert named.get(where, "gradient of") in str(error.value)
    if where == "gradient":
        assert "transformer_blocks.1" in str(error.value)
    assert isinstance(error.value, InputError)
    assert str(trainer.workspace.folder) in str(error.value)
    kept = trainer.workspace.load("recovery")
    assert all(torch.isfinite(t).all() for t in kept.values() if t.is_floating_point())
    assert json.loads(trainer.workspace.notes("recovery")["trainer"])["step"] == 5
    if where == "weight":  # without the cause it goes on from there, to the bits of an undisturbed run
        student, trainer, loss = recovery()
        with loss:
            trainer.run(NEVER)
        trainer.workspace.remove()
        trainer.workspace.open({}, False)
        other, second, loss = recovery()
        with loss:
            second.run(NEVER)
        assert all(map(torch.equal, student.state_dict().values(), other.state_dict().values()))


def test_a_loss_that_runs_away_is_resumed_from_before_it(recovery: Callable[..., Any]) -> None:
    student, trainer, loss = recovery(duration=Duration(steps=20), save_steps=2)

    def runs_away(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1.0 if trainer.step < 9 else 1e3 if trainer.step < 14 else float("inf"))

    student.transformer_blocks[1].ff.net[2].register_forward_hook(runs_away)
    with loss, pytest.raises(Diverged, match=r"step 15 of 20.*goes on from the state after step 8"):
        trainer.run(NEVER)
    assert trainer.log.entries[-1]["loss"] > 100 * trainer.log.entries[7]["loss"]
    student, trainer, loss = recovery(duration=Duration(steps=20), save_steps=2)
    with loss:
        trainer.run(NEVER)
    assert trainer.step == 20
    assert trainer.log.entries[-1]["loss"] < 2 * trainer.log.entries[7]["loss"]


def test_a_run_that_diverges_at_once_begins_anew(recovery: Callable[..., Any]) -> None:
    student, trainer, loss = recovery()
    student.transformer_blocks[1].ff.net[2].register_forward_hook(lambda *call: call[2] * float("nan"))
    with loss, pytest.raises(Diverged, match=r"step 1 of 12.*goes on from its start"):
        trainer.run(NEVER)


def test_a_budget_in_seconds_becomes_steps_once(recovery: Callable[..., Any]) -> None:
    student, trainer, loss = recovery(duration=Duration(seconds=2.0))
    before = {name: t.clone() for name, t in student.state_dict().items()}
    with loss:
        total = trainer._steps()
    assert total >= 10
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items()), "measuring trained something"
    with loss, pytest.raises(Killed):
        trainer.run(_kill_at(4))
    planned = trainer.total
    _, trainer, loss = recovery(duration=Duration(seconds=2.0))
    with loss, pytest.raises(Killed):
        trainer.run(_kill_at(6))
    assert trainer.total == planned


def test_a_share_of_the_samples_loses_its_condition(stream: Stream) -> None:
    labels = torch.cat([stream.batch("recovery", step).arguments["class_labels"] for step in range(100)])
    assert (labels == 1000).float().mean() == pytest.approx(0.1, abs=0.04)
    assert set(labels.tolist()) == {*range(10), 1000}


def test_every_process_gets_its_share_of_the_same_batch(stream: Stream) -> None:
    whole = stream.batch("recovery", 5)
    parts = [replace(stream, rank=rank, world=3).batch("recovery", 5) for rank in range(3)]
    for field in ("noised", "timestep", "target"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
    shares = [replace(stream, rank=rank, world=3).share for rank in range(3)]
    mean = sum(share * float(part.noised.mean()) / 3 for share, part in zip(shares, parts, strict=True))
    assert mean == pytest.approx(float(whole.noised.mean()), abs=1e-6), "8 samples of 3 processes"
    assert not torch.equal(stream.batch("recovery", 6).noised, whole.noised)
    assert not torch.equal(stream.batch("search", 5).noised, whole.noised)
    assert not torch.equal(replace(stream, seed=1).batch("recovery", 5).noised, whole.noised)


def test_batches_split_without_a_rest(stream: Stream) -> None:
    batch = stream.batch("recovery", 0)
    parts = list(batch.split(3))
    assert [len(part.noised) for part, _ in parts] == [3, 3, 2]
    assert sum(share for _, share in parts) == pytest.approx(1)
    assert torch.equal(torch.cat([part.target for part, _ in parts]), batch.target)
    assert isinstance(parts[0][0], Batch)


def test_the_sparkline_falls_with_the_loss() -> None:
    assert sparkline([1.0, 0.1, 0.01]) == "█▅▁"
    assert len(sparkline(list(range(1, 100)))) == 16
