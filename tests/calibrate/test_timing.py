"""The clock of a budget in milliseconds, on a real GPU; what is made of its times: test_schedule_and_budget.py."""

import pytest
import torch

from vdit_quant.calibrate.mixed import CANDIDATES
from vdit_quant.calibrate.timing import MODULATION_ROWS, ROWS, gpu_timer
from vdit_quant.quantize.spec import LayerSpec

pytestmark = pytest.mark.gpus(1)


@pytest.mark.parametrize("name", [f"{weight}-a8tok-h64" for weight in CANDIDATES])
def test_a_larger_layer_takes_longer(name: str) -> None:
    timer, spec = gpu_timer(torch.device("cuda"), "1ms"), LayerSpec.parse(name)
    small, large = timer(ROWS, 1152, 1152, spec), timer(ROWS, 4608, 4608, spec)
    assert 0.0 < small < large < 100.0


@pytest.mark.gpus(2)
def test_a_gpu_that_is_not_the_current_one_is_timed() -> None:
    spec = LayerSpec.parse("w4g64-a8tok-h64")
    first, second = (gpu_timer(torch.device("cuda", i), "1ms")(ROWS, 4608, 4608, spec) for i in (0, 1))
    assert 0.5 < first / second < 2.0


@pytest.mark.parametrize("name", [f"{weight}-h64" for weight in CANDIDATES])
def test_a_modulation_layer_is_timed_at_its_own_rows(name: str) -> None:
    timer, spec = gpu_timer(torch.device("cuda"), "1ms"), LayerSpec.parse(name)
    assert 0.0 < timer(MODULATION_ROWS, 6912, 1152, spec) < timer(ROWS, 6912, 1152, spec)
