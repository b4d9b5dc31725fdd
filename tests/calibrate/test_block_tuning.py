"""Blocks trained against the blocks they replace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vdit_quant
from vdit_quant.calibrate.block_input import BlockInput
from vdit_quant.calibrate.block_tuning import ROWS, draw, fit_block
from vdit_quant.calibrate.progress import Progress
from vdit_quant.calibrate.soft_codes import SoftCodes
from vdit_quant.quantize.errors import InputError
from vdit_quant.quantize.layer import dense_weight
from vdit_quant.quantize.method import FloatLayer, resolve_method
from vdit_quant.quantize.recipe import Recipe
from vdit_quant.quantize.spec import LayerSpec
from vdit_quant.quantize.stats import LayerStats
from vdit_quant.runtime.linear import CompressedLinear

N, K = 96, 128
PARAMS = {"steps": 150, "ratio": 1.0, "harden": 0.99, "slope": 1.0, "rate": 0.1, "book_rate": 0.01}


def _layer() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(K, N), torch.randn(256, K) * torch.linspace(0.2, 2, K)


def _soft(
    spec_name: str = "wvq2", candidates: int = 3, factor: float = 1.0
) -> tuple[SoftCodes, LayerSpec, nn.Linear, Tensor]:
    linear, x = _layer()
    linear.weight.data *= factor
    method, params = resolve_method("vq4dit", {"hadamard": 16})
    spec = method.complete(LayerSpec.parse(spec_name), N, K, params)
    stats = LayerStats.empty(K, frozenset({"gram"}))
    stats.update(x, 0, 0)
    with torch.no_grad():
        tensors = method.compress(FloatLayer("x", linear.weight, linear.bias), stats, spec, **params)
    return SoftCodes(tensors, spec, linear.weight.detach(), linear.bias.detach(), candidates), spec, linear, x


@pytest.mark.parametrize("spec_name", ["wvq2", "wvq3", "wvq2-r8", "wvq2-s", "wvq2-s-r8"])
def test_untrained_and_hard_it_is_the_layer_it_was_made_from(spec_name: str) -> None:
    soft, spec, _, _ = _soft(spec_name)
    soft.harden(0.0)
    torch.testing.assert_close(soft.dense(), dense_weight(soft.tensors, K, spec), rtol=1e-4, atol=1e-5)
    stored = soft.store()
    assert {key: (t.shape, t.dtype) for key, t in stored.items()} == {
        key: (t.shape, t.dtype) for key, t in soft.tensors.items()
    }
    assert torch.equal(stored["weight"], soft.tensors["weight"])


def test_no_run_has_the_same_candidate_twice() -> None:
    soft, *_ = _soft()
    ordered = soft.choices.sort(1)[0]
    assert (ordered.diff(dim=1) > 0).all()


def test_mixtures_are_soft_until_they_are_hardened() -> None:
    soft, *_ = _soft()
    before = soft.dense().detach()
    assert float(soft.ratio_loss().detach()) > 0.1
    soft.harden(0.9999)
    assert not soft.fixed.any()
    soft.harden(0.0)
    assert soft.fixed.all()
    assert float(soft.ratio_loss().detach()) == 0
    assert not torch.equal(soft.dense(), before)


@pytest.mark.parametrize("spec_name", ["wvq2", "wvq2-r8", "wvq2-s", "wvq2-s-r8"])
def test_training_lowers_the_error_of_what_is_stored_and_moves_codes_codebook_and_bias(spec_name: str) -> None:
    soft, spec, linear, x = _soft(spec_name)
    block = nn.Sequential(soft)
    with torch.no_grad():
        inputs, targets = [BlockInput.of(((x,), {}), len(x), None)], [(linear(x),)]
    first, last = fit_block(block, [soft], inputs, targets, PARAMS)
    stored = soft.store()
    y, target = x @ dense_weight(stored, K, spec).T + soft.bias, targets[0][0]
    power = (target - target.mean(0)).square().sum()
    error = float((y - target).detach().square().sum() / power)
    plain = dense_weight(soft.tensors, K, spec)
    before = float((x @ plain.T + linear.bias - target).detach().square().sum() / power)
    assert last < first
    assert error < 0.95 * before
    assert abs(error / last - 1) < 0.2, "what is stored must be what was trained"
    for key in ("weight", "weight_codebook", "weight_scale"):
        assert not torch.equal(stored[key], soft.tensors[key])
    assert not torch.equal(soft.bias, linear.bias)
    for key in {"hadamard_signs", "pre_quant_scale", "proj_up", "proj_down"} & set(stored):
        assert torch.equal(stored[key], soft.tensors[key])


def test_a_layer_of_zeros_stays_one() -> None:
    soft, spec, linear, x = _soft(factor=0.0)
    with torch.no_grad():
        inputs, targets = [BlockInput.of(((x,), {}), len(x), None)], [(linear(x),)]
    fit_block(nn.Sequential(soft), [soft], inputs, targets, {**PARAMS, "steps": 3})
    assert not dense_weight(soft.store(), K, spec).any()


def test_a_draw_takes_the_same_rows_of_every_tensor_that_has_them() -> None:
    rows = torch.arange(100.0)
    given = {"labels": rows, "table": torch.zeros(3), "nested": {"t": rows}, "flag": None}
    inputs = BlockInput.of(((rows[:, None],), given), len(rows), None)
    args, kwargs, (target, double) = draw([inputs], [(rows, 2 * rows)], torch.Generator().manual_seed(0))
    assert len(target) == ROWS
    for value in (args[0][:, 0], kwargs["labels"], kwargs["nested"]["t"], double / 2):
        assert torch.equal(value, target)
    assert kwargs["table"].shape == (3,)
    assert kwargs["flag"] is None


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _recipe(**params: float) -> Recipe:
    step = {"method": "vq4dit", "spec": "wvq2", "roles": ["feed_forward"], "params": {"hadamard": 16, **params}}
    return Recipe.from_dict({"step": [step]}, "vq2")


def _compress(model: nn.Module, folder: Path, progress: Progress | None = None, **params: float) -> Path:
    data = [torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return vdit_quant.compress(model, folder, data=data, recipe=_recipe(**params), progress=progress, device="cpu")


def test_a_trained_model_is_nearer_to_its_original_and_leaves_it_as_it_was(tmp_path: Path, notes: Any) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(32, 4, 8)
    with torch.no_grad():
        want, errors = model(x), {}
        for steps in (0, 60):
            folder = _compress(model, tmp_path / str(steps), notes, steps=steps)
            loaded = vdit_quant.load_into(Model(), folder)
            errors[steps] = float((loaded(x) - want).norm())
    assert errors[60] < 0.8 * errors[0]
    assert [line.split(":")[0] for line in notes.lines if "before training" in line] == ["blocks.0", "blocks.1"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, CompressedLinear) for m in model.modules())


def test_an_interrupted_training_goes_on_to_the_same_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vdit_quant.calibrate import block_tuning

    torch.manual_seed(0)
    model = Model().eval()
    whole = _compress(model, tmp_path / "whole", steps=5)
    original, calls = block_tuning.fit_block, []

    def dying(*args: object) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(block_tuning, "fit_block", dying)
    with pytest.raises(KeyboardInterrupt):
        _compress(model, tmp_path / "again", steps=5)
    monkeypatch.setattr(block_tuning, "fit_block", original)
    data = [torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    options = {"data": data, "recipe": _recipe(steps=5), "device": "cpu", "resume": True}
    again = vdit_quant.compress(model, tmp_path / "again", **options)
    for one, two in zip(sorted(whole.glob("*.safetensors")), sorted(again.glob("*.safetensors")), strict=True):
        first, second = load_file(one), load_file(two)
        assert first.keys() == second.keys()
        assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_training_beside_folded_scales_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    steps = [
        {"method": "vq4dit", "spec": "wvq2", "targets": ["*.ff.net.2"], "params": {"steps": 1, "hadamard": 16}},
        {"method": "ditas", "spec": "w4-a8tok", "roles": ["attention", "feed_forward"], "params": {"rank": 0}},
    ]
    recipe = Recipe.from_dict({"step": steps}, "mixed")
    with pytest.raises(InputError, match="folded into other layers"):
        vdit_quant.compress(tiny_folder, tmp_path / "out", recipe=recipe, steps=3, samples=2, device="cpu")


@pytest.mark.gpus(1)
def test_training_by_cuda_graphs_ends_where_plain_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from vdit_quant.calibrate import block_tuning

    def train() -> tuple[float, Tensor]:
        soft, _, linear, x = _soft()
        soft, linear, x = soft.cuda(), linear.cuda(), x.cuda()
        for name in ("scale", "choices", "fixed", "signs"):
            setattr(soft, name, getattr(soft, name).cuda())
        with torch.no_grad():
            target = linear(x)
        inputs = BlockInput.of(((x,), {}), len(x), None)
        _, last = fit_block(nn.Sequential(soft), [soft], [inputs], [(target,)], {**PARAMS, "harden": 1.1})
        return last, soft.dense().detach()

    last, weight = train()
    monkeypatch.setattr(block_tuning, "CapturedStep", lambda step: step)
    plain, expected = train()
    assert abs(last / plain - 1) < 0.02
    assert float((weight - expected).norm() / expected.norm()) < 0.05
