"""Options and recipes that cannot be used: the message suggests what would work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import PixArtTransformer2DModel

Refused = Callable[..., str]

GOOD = """
[[step]]
kind = "quantize"
method = "rtn"
spec = "w4g64-a8tok"
roles = ["attention", "feed_forward"]
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "w4a9"), ("--bits", "w4a9", "did you mean 'w4a8'")),
        (("--method", "rtm"), ("method", "rtm", "did you mean 'rtn'")),
        (("--bits", "w4a4", "--method", "nf4"), ("method nf4", "expected layers in nf4", "wfp4-ae2m1g16", "--bits")),
        (("--bits", "w4a8", "--method", "vq4dit"), ("method vq4dit", "vq2 or vq3", "found w4g64-a8tok-h64", "--bits")),
        (("--keep", "blocks.99.*"), ("--keep", "blocks.99.*", "matches no layer", "transformer_blocks.0")),
        (("--group-size", "128"), ("transformer_blocks.0.attn1.to_q", "128", "K = 64", "--group-size")),
        (("--group-size", "48"), ("transformer_blocks.0.attn1.to_q", "48", "known")),
        (("--recipe", "nowhere.toml"), ("nowhere.toml",)),
        (("--device", "gpu"), ("gpu",)),
        (("--device", "cuda:7"), ("cuda:7",)),
        (("--device", "meta"), ("meta", "no numbers")),
    ],
)
def test_a_wrong_option(options: tuple[str, ...], words: tuple[str, ...], refused: Refused, tiny_folder: Path) -> None:
    refused("calibrate", tiny_folder, "-o", "out", *options, words=words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("method =", "metod ="), ("metod", "did you mean 'method'")),
        (("w4g64-a8tok", "wt"), ("transformer_blocks.0.attn1.to_q", "destroy", "w2a16", "--i-know")),
        (("kind =", "kynd ="), ("kynd", "did you mean 'kind'")),
        (("[[step]]", "[[steps]]"), ("steps", "did you mean 'step'")),
        (('"quantize"', '"quantise"'), ("quantise", "did you mean 'quantize'")),
        (('"rtn"', '"rtm"'), ("rtm", "did you mean 'rtn'")),
        (('"attention"', '"atention"'), ("atention", "did you mean 'attention'")),
        (("w4g64-a8tok", "w5g64-a8tok"), ("w5g64-a8tok", "5g64")),
        (("w4g64-a8tok", "w4g64-a8tok-q3"), ("q3",)),
        (('["attention", "feed_forward"]', '"attention"'), ("roles", "list")),
        (('["attention", "feed_forward"]', "[]"), ("selects nothing",)),
        (
            ('roles = ["attention", "feed_forward"]', 'targets = ["no.such.*"]'),
            ("no.such.*", "matches no layer", "attn1.to_q"),
        ),
        (('kind = "quantize"', "kind = 3"), ("mine.toml, step 1", "kind", "string")),
        (("[[step]]", "name = 4\n[[step]]"), ("mine.toml", "name", "string")),
        (("[[step]]", "description = 4\n[[step]]"), ("mine.toml", "description", "string")),
        (('kind = "quantize"', 'kind = "quantize"\nparams = {clyp = "none"}'), ("clyp", "did you mean 'clip'")),
        (('kind = "quantize"', 'kind = "quantize"\nparams = {clip = 3}'), ("clip", "str", "int")),
        (('kind = "quantize"', 'kind = "quantize"\nparams = {clip = "nine"}'), ("clip", "nine", "output")),
        (('kind = "quantize"', 'kind = "quantize"\nparams = 3'), ("params",)),
        (('spec = "w4g64-a8tok"', "spec = 4"), ("spec", "string")),
        (("[[step]]", "keep = 3\n[[step]]"), ("keep",)),
        (("[[step]]", "keep = [3]\n[[step]]"), ("keep",)),
        (('["attention", "feed_forward"]', "[3]"), ("roles",)),
        (('roles = ["attention", "feed_forward"]', "targets = [3]"), ("targets",)),
        (("w4g64-a8tok", "w4g0-a8tok"), ("group_size", "0")),
        (("w4g64-a8tok", "w8-h48"), ("hadamard", "48")),
        (("w4g64-a8tok", "w8-h32r"), ("hadamard", "32")),
        (("w4g64-a8tok", "w8-h128"), ("transformer_blocks.0.attn1.to_q", "128", "K = 64")),
        (("w4g64-a8tok", "w8-r65"), ("transformer_blocks.0.attn1.to_q", "rank 65")),
        (("w4g64-a8tok", "w8-s-s"), ("w8-s-s",)),
        (("w4g64-a8tok", "w8g64"), ("int8", "64")),
        (("w4g64-a8tok", "w8-a4g48"), ("int4", "48")),
        (("w4g64-a8tok", "w4g64-s"), ("transformer_blocks.0.attn1.to_q", "rtn", "pre_quant_scale", "another method")),
        (("w4g64-a8tok", "w8-h32"), ("transformer_blocks.0.attn1.to_q", "rtn", "hadamard_signs", "another method")),
        (("w4g64-a8tok", "w8-r4"), ("transformer_blocks.0.attn1.to_q", "rtn", "proj_down", "another method")),
        (('method = "rtn"', 'method = "gptq"\nparams = {damp = nan}'), ("mine.toml", "damp", "finite", "nan")),
        (("[[step]]", "step = 3"), ("step",)),
        (("[[step]]", "[step"), ("not valid TOML",)),
    ],
)
def test_a_wrong_recipe(
    change: tuple[str, str], words: tuple[str, ...], refused: Refused, tiny_folder: Path, tmp_path: Path
) -> None:
    text = GOOD.replace(*change)
    assert text != GOOD
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text, encoding="utf-8")
    refused("calibrate", tiny_folder, "-o", "out", "--recipe", recipe, words=words)


@pytest.mark.parametrize("options", [("--set", "clyp=none"), ("--method", "gptq")])
def test_an_option_that_changes_no_step(
    options: tuple[str, ...], refused: Refused, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(GOOD.replace('roles = ["attention", "feed_forward"]', 'targets = ["*"]'), encoding="utf-8")
    refused(
        "calibrate", tiny_folder, "--recipe", recipe, *options, words=(" ".join(options), "recipe mine", "attention")
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "w2a8", "--set", "rounding=nearst"), ("rounding", "did you mean 'nearest'")),
        (("--set", "damp=nan"), ("damp", "finite", "found nan")),
        (("--set", "damp=0"), ("damp", "at least", "found 0")),
        (("--set", "smooth=fixed", "--set", "alpha=500"), ("alpha", "at most 1", "found 500")),
        (("--set", "sweeps=-1"), ("sweeps", "at least 0", "found -1")),
        (("--set", "alpha=0.7"), ("--set alpha", "changes nothing", "viditq with w4g64-a8tok-h")),
        (("--bits", "w2a8", "--method", "viditq", "--set", "clip=weight"), ("--set clip", "wvq2-a8tok")),
        (("--bits", "w4a4", "--set", "rounding=rtn", "--set", "damp=0.1"), ("--set damp", "hqdit with")),
        (("--bits", "w2a8", "--set", "candidates=0"), ("candidates", "at least 1", "found 0")),
        (("--bits", "w8a8", "--group-size", "32"), ("--group-size 32", "groups", "w8-a8tok")),
        (("--bits", "w4a16", "--method", "nf4", "--group-size", "32"), ("--group-size 32", "groups", "wnf4g64")),
        (("--budget", "5bits", "--group-size", "32"), ("--group-size 32", "--budget")),
        (("--bits", "w4a16", "--full-steps", "1,0"), ("--full-steps 1,0", "compute dtype already")),
        (("--budget", "1bits"), ("1bits", "cannot be met")),
        (("--full-steps", "9,9", "--steps", "4"), ("--full-steps 9,9", "4 steps")),
        (("--sensitivity", "dift"), ("--sensitivity", "did you mean 'drift'")),
        (("--seed", "99999999999999"), ("--seed", "from 0 to")),
        (("--dtype", "float"), ("dtype", "float16")),
        (("--prompts", "nope.txt"), ("nope.txt", "prompts cannot be read")),
        (("--conditions", "nope.safetensors"), ("nope.safetensors", "conditions cannot be read")),
        (("--size", "32x32"), ("--size", "for a pipeline")),
        (("--bits", "w8a8", "--recipe", "mine.toml"), ("--bits w8a8", "--recipe mine.toml", "not both")),
        (("--sensitivity", "samples"), ("--sensitivity samples", "needs --budget")),
        (("--stats-gb", "-1"), ("--stats-gb", "expected a positive number, found -1")),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    options: tuple[str, ...], words: tuple[str, ...], refused: Refused, tiny_folder: Path
) -> None:
    refused("calibrate", tiny_folder, "--dry-run", *options, words=words)


def test_a_text_model_without_conditions_is_refused_unless_nothing_is_sampled(
    refused: Refused, cli: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "pixart"
    sizes = {"num_layers": 2, "cross_attention_dim": 64, "caption_channels": 32, "sample_size": 8, "norm_num_groups": 2}
    PixArtTransformer2DModel(2, 32, in_channels=4, out_channels=8, **sizes).save_pretrained(folder)
    for more in (("--dry-run",), ()):
        refused("calibrate", folder, "-o", "out", *more, words=("pixart", "--conditions FILE"))
        refused("prune", folder, "--keep", "1", "-o", "out", *more, words=("pixart", "--conditions FILE"))
    assert cli("calibrate", folder, "--bits", "w8a16", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompts", "prompts.txt"), ("prompts.txt", "takes no prompt")),
        (("--conditions", "prompts.txt"), ("prompts.txt", "not for a whole pipeline")),
        (("--size", "32x32"), ("--size 32x32", "takes no height")),
    ],
)
def test_a_dry_run_knows_what_a_pipeline_does_not_take(
    options: tuple[str, ...], words: tuple[str, ...], refused: Refused, demo: Path
) -> None:
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    refused("calibrate", demo, "--dry-run", *options, words=words)


def test_a_dry_run_looks_for_data(refused: Refused, tiny_folder: Path) -> None:
    refused("prune", tiny_folder, "--keep", "1", "--data", "nope", "--dry-run", words=("nope", "found none"))


def test_a_dry_run_takes_an_output_that_exists_for_a_note(
    cli: Callable[..., Any], refused: Refused, tiny_folder: Path
) -> None:
    Path("tiny-dit-w4a8").mkdir()
    result = cli("calibrate", tiny_folder, "--dry-run")
    assert result.code == 0, result.err
    assert "without --dry-run refused: tiny-dit-w4a8 exists" in result.out
    refused("calibrate", tiny_folder, "--dry-run", "--keep", "blocks.99.*", words=("matches no layer",))
    refused("calibrate", tiny_folder, words=("tiny-dit-w4a8 exists", "--overwrite"))


def test_a_dry_run_under_a_budget_says_that_its_plan_is_not_the_last_word(
    cli: Callable[..., Any], tiny_folder: Path
) -> None:
    result = cli("calibrate", tiny_folder, "--dry-run", "--budget", "4.5bits")
    assert result.code == 0, result.err
    assert "--budget 4.5bits: the table is the recipe's plan; the run" in result.out


def test_a_recipe_that_is_not_text(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_bytes(b"\xff\xfe\x00\x01")
    refused("calibrate", tiny_folder, "--recipe", recipe, words=("mine.toml", "cannot be read"))
