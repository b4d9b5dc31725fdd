"""Compiled kernels: each once, whoever asks for it."""

import threading

import pytest

once = pytest.importorskip("vdit_quant.kernels._triton.once", reason="triton is not installed")


def test_what_two_threads_ask_for_is_made_once_and_both_launch() -> None:
    kernels, made, launched = once.Once(), threading.Event(), []

    def launch(name: str) -> None:
        def first() -> str:
            made.wait(60)
            return name

        found = kernels.make("key", first)
        launched.append((name, found))

    threads = [threading.Thread(target=launch, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    made.set()
    for thread in threads:
        thread.join()
    (first, none), (second, found) = sorted(launched, key=lambda pair: pair[1] is not None)
    assert none is None
    assert found == first == kernels.get("key")
    assert second != first


def test_what_could_not_be_made_is_made_by_the_next() -> None:
    kernels = once.Once()
    with pytest.raises(RuntimeError, match="does not compile"):
        kernels.make("key", lambda: (_ for _ in ()).throw(RuntimeError("does not compile")))
    assert kernels.get("key") is None
    assert kernels.make("key", lambda: "kernel") is None
    assert kernels.get("key") == "kernel"
    kernels.clear()
    assert kernels.get("key") is None
