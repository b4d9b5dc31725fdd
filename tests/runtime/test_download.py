"""Hub ids: what is fetched of a repository, and what is said when nothing can be."""

from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from vdit_quant.quantize.errors import InputError
from vdit_quant.runtime.source import find_source


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of diffusers and of the hub, neither of which is reached; the tests say what they answer."""
    calls: list[Any] = []

    def answer(name: str, answers: dict[str, Any]) -> Any:
        def call(repo: str, **options: Any) -> str:
            calls.append((name, repo, options))
            if isinstance(answers[name], Exception):
                raise answers[name]
            return str(answers[name])

        return call

    answers: dict[str, Any] = {}
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", answer("pipeline", answers))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer("bare", answers))
    calls.append(answers)
    return calls


def test_of_a_pipeline_its_own_files_are_fetched(asked: list[Any], demo: Path) -> None:
    asked[0]["pipeline"] = demo
    found = find_source("owner/model")
    assert (found.root, found.label, found.is_pipeline) == (demo, "owner/model", True)
    assert asked[1:] == [("pipeline", "owner/model", {"use_safetensors": True, "trust_remote_code": False})]


def test_without_a_pipeline_a_bare_transformer_is(asked: list[Any], tiny_folder: Path) -> None:
    asked[0].update(pipeline=EntryNotFoundError("no model_index.json"), bare=tiny_folder)
    found = find_source("owner/model")
    assert (found.root, found.is_pipeline) == (tiny_folder, False)
    patterns = asked[2][2]["allow_patterns"]
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in patterns)
    assert any(Path("diffusion_pytorch_model-00001-of-00002.safetensors").match(pattern) for pattern in patterns)


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_what_cannot_be_fetched_is_one_clear_error(kind: type[Exception], asked: list[Any]) -> None:
    asked[0]["pipeline"] = kind("no way there")
    with pytest.raises(
        InputError, match=r"owner/model: no such folder here, .*could not be downloaded \(no way there\)"
    ):
        find_source("owner/model")


def test_what_is_no_id_is_never_asked_for(asked: list[Any]) -> None:
    for name in ("nowhere", "../x", "a/b/c", "https://a/b"):
        with pytest.raises(InputError, match="no such folder, and not a hub id"):
            find_source(name)
    assert len(asked) == 1
