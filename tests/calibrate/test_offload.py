"""With --offload at most one block is on the device, and every statistic is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vdit_quant
from vdit_quant.calibrate import replay
from vdit_quant.calibrate.progress import Progress
from vdit_quant.calibrate.replay import BlockChain
from vdit_quant.evaluate.offload import BlockStream
from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.family import Family
from vdit_quant.runtime.step import StepTracker

FAST = {"samples": 3, "steps": 4, "guidance": 1.5, "device": "cpu", "bits": "w4a8"}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class Spy:
    """How many blocks are fetched at a time, and how often each is."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.most, self.fetched = set[str](), 0, dict[str, int]()
        fetch, drop = BlockStream._fetch, BlockStream._drop

        def fetching(stream: BlockStream, block: str, part: nn.Module) -> None:
            fetch(stream, block, part)
            self.now.add(block)
            self.most = max(self.most, len(self.now))
            if part is stream.model.get_submodule(block):
                self.fetched[block] = self.fetched.get(block, 0) + 1

        def dropping(stream: BlockStream, block: str) -> None:
            drop(stream, block)
            self.now.discard(block)

        patch.setattr(BlockStream, "_fetch", fetching)
        patch.setattr(BlockStream, "_drop", dropping)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vdit_quant.compress(None, tmp_path_factory.mktemp("whole") / "out", **FAST)


@pytest.mark.parametrize("memory", [4e9, 8e5], ids=["in memory", "on disk"])
def test_the_artifact_is_the_same_with_one_block_on_the_device(
    memory: float, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MEMORY", memory)
    spy, files = Spy(monkeypatch), list[Path]()
    saving = replay.save_file
    monkeypatch.setattr(replay, "save_file", lambda tensors, path: (files.append(path), saving(tensors, path)))
    streamed = vdit_quant.compress(None, tmp_path / "out", offload=True, **FAST)
    want, got = load_file(whole / WEIGHTS), load_file(streamed / WEIGHTS)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    calls = {path.name for path in files}
    assert bool(calls) == (memory < 1e9)
    assert len(calls) < 2 * 4, "some of the inputs and outputs of four calls are in memory"
    assert spy.most == 1, "one block at a time"
    assert not spy.now
    assert len(spy.fetched) == 8
    assert set(spy.fetched.values()) == {4 + 1}, "once a sampling step, and once for all of its statistics"


def test_an_interrupted_run_goes_on_with_the_blocks_that_are_missing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Progress):
        def advance(self, done: int, detail: str = "") -> None:
            if detail == "transformer_blocks.3":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vdit_quant.compress(None, tmp_path / "out", progress=Stop(), offload=True, **FAST)
    folder = tmp_path / ".out.partial"
    assert len(list(folder.glob("stats-*.safetensors"))) == 3
    assert not list(folder.glob("*.activations"))
    vdit_quant.compress(None, tmp_path / "out", offload=True, resume=True, **FAST)
    want, got = load_file(whole / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(got[name], want[name]) for name in want)


class Skipping(nn.Module):
    """Blocks that read more than the output before: the second one also reads what the model made of it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Bilinear(4, 4, 4) for _ in range(2))
        self.change = change

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        first = self.blocks[0](x, x)
        return self.blocks[1](self.change(first), x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "fails"),
    [(lambda y: y, False), (lambda y: y * 2, True), (lambda y: y.add_(1), True)],
    ids=["a chain", "changed between", "changed in place"],
)
def test_a_block_that_cannot_be_run_alone_is_named(change: Any, fails: bool, tmp_path: Path) -> None:
    model, family = Skipping(change), Family("test", ("Skipping",), ("blocks",), ())
    x, seen = torch.randn(3, 4), list[Tensor]()
    with StepTracker(model, family) as tracker, BlockChain(model, ["blocks.0", "blocks.1"], tracker, tmp_path) as chain:
        if fails:
            with pytest.raises(InputError, match=r"blocks\.1 cannot be run alone.*blocks\.0"):
                model(x, timestep=torch.tensor([5.0]))
            return
        want = model(x, timestep=torch.tensor([5.0]))
        chain.stop()
        handle = model.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
        for number in range(2):
            chain.run(number, torch.device("cpu"), lambda place: None)
        handle.remove()
    assert torch.equal(seen[0], want)


def test_a_block_that_a_call_leaves_out_is_named(tmp_path: Path) -> None:
    class Leaving(Skipping):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.blocks[0](x, x)

    model, family = Leaving(lambda y: y), Family("test", ("Leaving",), ("blocks",), ())
    chain = BlockChain(model, ["blocks.0", "blocks.1"], StepTracker(model, family), tmp_path)
    with chain.tracker, chain, pytest.raises(InputError, match=r"blocks\.1 does not run in every call"):
        model(torch.randn(3, 4), timestep=torch.tensor([5.0]))


def test_a_model_object_and_trained_blocks_are_refused(tiny_dit: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in memory already"):
        vdit_quant.compress(tiny_dit(), tmp_path / "x", data=lambda model: None, offload=True, device="cpu")
    with pytest.raises(InputError, match="trains whole blocks"):
        vdit_quant.compress(None, tmp_path / "x", bits="w2a16", params=("steps=5",), offload=True, device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpus(1)
def test_the_gpu_holds_one_block_and_gives_the_same_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {**FAST, "device": "cuda"}
    whole = vdit_quant.compress(None, tmp_path / "whole", **common)
    devices, fetch = list[set[str]](), BlockStream._fetch

    def fetching(stream: BlockStream, block: str, part: nn.Module) -> None:
        fetch(stream, block, part)
        modules = {name: stream.model.get_submodule(name) for name in stream.blocks}
        devices.append({name for name, module in modules.items() if any(t.is_cuda for t in module.parameters())})

    monkeypatch.setattr(BlockStream, "_fetch", fetching)
    streamed = vdit_quant.compress(None, tmp_path / "out", offload=True, **common)
    want, got = load_file(whole / WEIGHTS), load_file(streamed / WEIGHTS)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert devices
    assert all(len(there) == 1 for there in devices)
