"""What `inspect` says will run is what runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vdit_quant
from vdit_quant.kernels import dispatch
from vdit_quant.kernels.dispatch import Choice
from vdit_quant.runtime.describe import describe_artifact
from vdit_quant.runtime.doctor import examine
from vdit_quant.runtime.fused_ops import _Recorder
from vdit_quant.runtime.fusion import fuse


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_ops_of_every_layer_are_those_that_run(
    device: str, tiny_artifact: Path, dit_inputs: Callable[..., Any]
) -> None:
    model = vdit_quant.load(tiny_artifact, device="cpu")
    with _Recorder() as recorder:
        (fuse(model, cpu=True) if device == "cuda" else model)(**dit_inputs(model))
    rows = {
        row["pattern"].rpartition(".*.")[2]: row["kernels"]
        for row in describe_artifact(tiny_artifact, device)["layers"]
    }
    told = {op for kernels in rows.values() for op in kernels.removeprefix("fused: ").replace(" | ", ", ").split(", ")}
    assert set(recorder.ops) - {"attention"} == told
    if device == "cuda":
        assert rows["attn1.to_q"] == "fused: norm_quant | act_quant, int4_to_int8, int8_linear"
        assert rows["ff.net.2"] == "fused: norm_quant | act_quant, int4_to_int8, int8_linear | int8_linear_add"
    else:
        assert rows["ff.net.2"] == "quant_token, int4_linear"


def test_kernels_are_asked_for_the_sizes_of_each_layer(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def explain(op: str, device: torch.device, **facts: int) -> Choice:
        asked.add((op, facts["n"], facts["k"], facts.get("group")))
        refused = op == "act_quant" and facts["k"] == 256
        return Choice(op, "reference" if refused else "triton", "too wide" if refused else "supported")

    monkeypatch.setattr(dispatch, "explain", explain)
    found = describe_artifact(tiny_artifact, "cuda")
    assert {("int4_to_int8", 256, 64, 64), ("int4_to_int8", 64, 256, 64), ("norm_quant", 64, 64, 64)} <= asked
    assert found["reasons"] == ["act_quant: reference, because too wide"]
    assert {row["pattern"]: row["backend"] for row in found["layers"]} == {
        row["pattern"]: "mixed" if row["pattern"].endswith("ff.net.2") else "triton" for row in found["layers"]
    }


def test_a_lesser_form_of_a_kernel_is_told(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = "the portable Triton producers run: no such layout"
    monkeypatch.setattr(
        dispatch,
        "explain",
        lambda op, *_, **__: Choice(op, "triton", "supported", note if op == "norm_quant" else None),
    )
    assert describe_artifact(tiny_artifact, "cuda")["reasons"] == [f"norm_quant: triton, {note}"]
    assert {"op": "norm_quant", "backend": "triton", "reason": note} in examine()["kernels"]
