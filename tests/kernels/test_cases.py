"""What every file of cases/ must say: all ops, each once, and nothing that no test picks up."""

import inspect

import pytest

from cases import _case
from vdit_quant.kernels.dispatch import TWINS


def test_every_op_has_a_case() -> None:
    covered = [op for name in _case.names() for op in _case.load(name).OPS]
    assert sorted(covered) == sorted(TWINS)


@pytest.mark.parametrize("name", _case.names())
def test_a_file_of_cases_is_complete(name: str, make_layer) -> None:
    file = _case.load(name)
    examples = file.examples(make_layer(3, 64, 8, 32))
    assert set(examples) == set(file.OPS)
    assert all(examples.values())
    own = [f for f, value in vars(file).items() if inspect.isfunction(value) and value.__module__ == file.__name__]
    known = ("examples", "compile_cases", "interpreter_", "cuda_", "_")
    assert [f for f in own if not f.startswith(known)] == []
    for kind in known[:4]:
        assert any(f.startswith(kind) for f in own), f"{name} has no {kind}"
    assert {op for op, *_ in getattr(file, "LIMITS", ())} <= set(file.OPS)
