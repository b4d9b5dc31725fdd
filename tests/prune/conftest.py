"""Small models with enough blocks to take some out, and what a criterion is given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "dit": (
        "DiTTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 6, "sample_size": 8, "num_embeds_ada_norm": 1000},
        {"hidden_states": (4, 8, 8)},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 4, "cross_attention_dim": 32, "sample_size": 8,
         "caption_channels": 24},
        {"hidden_states": (4, 8, 8), "encoder_hidden_states": (3, 24)},
    ),
    "wan": (
        "WanTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48, "num_layers": 4,
         "rope_max_seq_len": 32},
        {"hidden_states": (4, 2, 8, 8), "encoder_hidden_states": (3, 24)},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {**HEADS, "in_channels": 4, "num_layers": 3, "num_single_layers": 4, "joint_attention_dim": 24,
         "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)},
        {"hidden_states": (16, 4), "encoder_hidden_states": (3, 24), "pooled_projections": (16,)},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "time_embed_dim": 32, "text_embed_dim": 24,
         "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 3},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (3, 24)},
    ),
    "large_dit": (
        "LargeDiT",
        {**HEADS, "num_layers": 4, "sample_size": 8, "ff_inner_dim": 64, "qk_norm": True},
        {"hidden_states": (4, 8, 8)},
    ),
}  # fmt: skip


def _build(name: str) -> Any:
    import diffusers

    from vdit_quant.runtime.models.large_dit import LargeDiT

    kind, arguments, _ = MODELS[name]
    torch.manual_seed(1)
    model = getattr(diffusers, kind, LargeDiT)(**arguments)
    with torch.no_grad():  # nothing may start at zero, or a block would not be missed
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if name == "dit":  # what a checkpoint holds: the same embedder in every block
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval().requires_grad_(False)


@pytest.fixture(params=MODELS)
def named_model(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """(family, random model of it), for every family that can be pruned."""
    return request.param, _build(request.param)


@pytest.fixture
def dit() -> Any:
    """A random DiT of six blocks."""
    return _build("dit")


@pytest.fixture
def call() -> Callable[..., dict[str, Any]]:
    """Call arguments of a model of `named_model`."""

    def make(name: str, batch: int = 3) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        given: dict[str, Any] = {
            key: torch.randn(batch, *shape, generator=generator) for key, shape in MODELS[name][2].items()
        }
        given["timestep"] = torch.full((batch,), 0.5 if name == "flux" else 500.0)
        if name in ("dit", "large_dit"):
            given["class_labels"] = torch.arange(batch)
        if name == "flux":
            given |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(3, 3)}
        return given

    return make


@pytest.fixture
def latents() -> Any:
    """Forty random latents with labels for the model of `dit`."""
    from vdit_quant.prune.latents import Latents

    generator = torch.Generator().manual_seed(3)
    rows = {"latents": torch.randn(40, 4, 8, 8, generator=generator), "class_labels": torch.arange(40) % 10}
    return Latents((rows,), {"class_labels": torch.tensor([1000])})


@pytest.fixture
def stream(latents: Any) -> Any:
    """Batches of eight of them, noised as a DDPM does."""
    import diffusers

    from vdit_quant.prune.objective import objective_of
    from vdit_quant.prune.stream import Stream
    from vdit_quant.runtime.families.dit import FAMILY

    objective = objective_of(diffusers.DDIMScheduler(beta_schedule="linear"), FAMILY)
    return Stream(latents, objective, FAMILY, 8, torch.device("cpu"))


@pytest.fixture
def study(dit: Any, stream: Any, tmp_path: Path) -> Callable[..., Any]:
    """What a criterion is given, for the model of `dit`, with a few steps of training."""
    from vdit_quant.calibrate.workspace import Workspace
    from vdit_quant.prune.budget import Duration
    from vdit_quant.prune.criterion import Study
    from vdit_quant.prune.plan import find_stacks
    from vdit_quant.prune.trainer import Training
    from vdit_quant.runtime.family import find_family

    def make(**options: Any) -> Any:
        workspace = Workspace(tmp_path / "out")
        workspace.open({}, False)
        training = Training(Duration(steps=options.pop("steps", 3)), micro=options.pop("micro", None))
        stacks = options.pop("stacks", None) or find_stacks(dit, find_family(dit))
        return Study(dit, stacks, stream, workspace, training, measured=2, **options)

    return make
