"""An op gives what its definition says, also where `torch.autocast` casts what torch's own ops are given."""

import pytest
import torch
from torch.utils import _pytree as pytree

from cases import _case

OPS = {op: name for name in _case.names() for op in _case.load(name).OPS}


@pytest.mark.parametrize("op", sorted(OPS))
def test_autocast_changes_nothing(op: str, make_layer) -> None:
    file = _case.load(OPS[op])
    for args in file.examples(make_layer(3, 64, 8, 32))[op]:
        expected = pytree.tree_leaves(file.OPS[op](*args))
        with torch.autocast("cpu", torch.bfloat16):
            found = pytree.tree_leaves(file.OPS[op](*args))
            assert torch.is_autocast_enabled("cpu")
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.double(), other.double())
