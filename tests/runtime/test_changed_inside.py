"""What is changed inside a fused block takes effect, and what is undone again leaves the block fused."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from small_models import CASES, Case, call, close, compressed

from vdit_quant.runtime.fusion import fuse, unfuse

WAN = CASES["wan"]
WAN_WITH_NORMS = replace(WAN, config={**WAN.config, "cross_attn_norm": True})


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize(
    "case", [CASES["cogvideox"], CASES["large_dit"], WAN_WITH_NORMS], ids=["cogvideox", "large_dit", "wan"]
)
def test_loaded_norms_are_used(case: Case, assign: bool) -> None:
    model = fuse(compressed(case, "w8-a8tok"), cpu=True)
    before = call(model, case)
    state = {name: t * 1.7 if "norm" in name and t.dim() == 1 else t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    after = call(model, case)
    assert not close(after, before)
    assert close(after, call(unfuse(model), case))
