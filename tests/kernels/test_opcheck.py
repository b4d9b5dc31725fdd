"""torch.library's own checks (schema, fake tensors, aliasing, torch.compile) on every op."""

import pytest
import torch

from cases import _case
from vdit_quant.kernels.int8_linear import int8_linear

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPS = {op: name for name in _case.names() for op in _case.load(name).OPS}


@pytest.mark.parametrize("op", sorted(OPS))
def test_opcheck(op: str, make_layer) -> None:
    file = _case.load(OPS[op])
    for args in file.examples(make_layer(3, 64, 8, 32))[op]:
        # The schema check compares tensors with operations that float8 does not have.
        floats8 = any(isinstance(t, torch.Tensor) and t.dtype == _case.E4M3 for t in args) or op == "quant_token_fp8"
        torch.library.opcheck(file.OPS[op].overload, args, test_utils=CHECKS[1:] if floats8 else CHECKS)


def test_fake_tensors_are_checked_too(make_layer) -> None:
    a = make_layer(3, 64, 8)
    with pytest.raises(ValueError, match="int8_linear: expected weight"):
        int8_linear(*(t.to("meta") for t in (a.codes, a.scale, a.weight[:, :9], a.weight_scale)), None, torch.float32)
