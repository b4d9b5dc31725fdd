"""Which blocks a run trains (see `block_tuning`), whether it can, and whether it does where its recipe says `auto`."""

from __future__ import annotations

import dataclasses

import torch

from ..evaluate.timesteps import latent_tokens
from ..quantize.errors import InputError
from ..quantize.method import AUTO, resolve_method
from ..quantize.recipe import Recipe
from ..quantize.vector import VectorFormat
from ..runtime.family import find_family
from ..runtime.source import Source
from .model_source import ModelSource
from .options import Options
from .plan import LayerPlan, Plan, make_plan

TOKENS = 1024
"""Tokens of the largest latent that blocks are trained on unasked. DiT-XL/2 has 256 for 256 x 256 pixels, and takes
minutes; time and memory grow with them, and no run should end without memory for what nobody asked for."""
SHARED = ("steps", "ratio", "harden", "slope", "rate", "book_rate")
"""Parameters of a training, which is one for all layers of a block."""


def is_tuned(layer: LayerPlan) -> bool:
    """Whether the layer is trained with its block."""
    if layer.block is None or not _is_trainable(layer):
        return False
    method, params = resolve_method(layer.method, layer.params)
    return method.block_steps(params) > 0


def needs_tuning(plan: Plan) -> bool:
    """Whether any block is trained. Raises InputError beside folded scales, which change two layers, and for layers of
    one block that ask for different trainings."""
    tuned = [layer for layer in plan.compressed if is_tuned(layer)]
    if tuned and plan.folds:
        raise InputError("block training and scales folded into other layers cannot be combined; set fold=false")
    first: dict[str | None, LayerPlan] = {}
    for layer in tuned:
        other = first.setdefault(layer.block, layer)
        one, two = other.full_params(), layer.full_params()
        for name in SHARED:
            if one[name] != two[name]:
                raise InputError(
                    f"layers {other.name} and {layer.name}: a block is trained as a whole, and their parameter "
                    f"'{name}' is {one[name]} and {two[name]}; give both the same, or one of them steps=0"
                )
    return bool(tuned)


def settle_training(
    source: Source | ModelSource, recipe: Recipe, settings: Options, device: torch.device
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with a number of steps wherever it says `auto`, and a word on what was decided, from names and shapes
    alone, for layers that are trained if any are."""
    if recipe.with_autos(True) == recipe:
        return recipe, ()
    model = source.skeleton()
    plan = make_plan(model, find_family(model), recipe)
    asked = [layer for layer in plan.compressed if _is_trainable(layer) and layer.full_params().get("steps") == AUTO]
    if not asked:
        return recipe.with_autos(False), ()
    steps = resolve_method(asked[0].method, {})[0].autos["steps"][0]
    tokens = latent_tokens(model, settings.conditions)
    switch = f"; --set steps={steps} turns it on"
    if settings.offload:
        off = "off with --offload"
    elif plan.folds:
        off = "off beside scales folded into other layers"
    elif isinstance(source, ModelSource):  # how many calls its data makes, all of which are held, is not known
        off = f"off for a model object{switch}"
    elif device.type == "cpu":
        off = f"off on a CPU{switch}"
    elif tokens is None or tokens > TOKENS:
        size = "of unknown size" if tokens is None else f"of {tokens:,} tokens"
        off = f"off for latents {size} (unasked up to {TOKENS:,}){switch}"
    else:
        return recipe.with_autos(True), (f"block training: {steps} steps a block; --set steps=0 leaves it out",)
    return recipe.with_autos(False), (f"block training: {off}",)


def untrained_notes(plan: Plan) -> tuple[str, ...]:
    """A word on layers that ask for a training and lie outside of the blocks that are trained."""
    names = [
        layer.name
        for layer in plan.compressed
        if layer.block is None and is_tuned(dataclasses.replace(layer, block="any"))
    ]
    if not names:
        return ()
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return (f"block training: layers outside of blocks are not trained ({len(names)}: {shown})",)


def _is_trainable(layer: LayerPlan) -> bool:
    return layer.spec is not None and isinstance(layer.spec.weight.resolve(), VectorFormat)
