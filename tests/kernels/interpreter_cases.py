"""Triton twins under the interpreter against the references; `test_interpreter.py` runs this in its own process."""

from cases import _case
from vdit_quant.kernels.dispatch import TWINS


def test_the_interpreter_is_on() -> None:
    from vdit_quant.kernels._triton.tiles import INTERPRETED

    assert INTERPRETED


globals().update(_case.tests("interpreter"))


def test_every_twin_has_run() -> None:
    """The last of the file: what ran before it is what it looks at."""
    assert _case.ran == set(TWINS)
