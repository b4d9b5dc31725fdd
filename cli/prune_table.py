"""What a pruning run is going to do, and what came out, as tables."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..prune.budget import Duration
from ..prune.criterion import find_criterion
from ..prune.options import Options, width_of
from ..prune.patterns import cut
from ..prune.pipeline import chosen_depths, default_output, open_source
from ..prune.plan import PrunePlan, Stack, find_stacks
from ..prune.writer import read_record
from ..runtime.family import find_family
from ..runtime.lineage import is_pruned
from ..runtime.load import pick_device
from ..runtime.writer import preview_target
from .console import bold, console, human_bytes, print_table, table


def print_preview(
    model: str | None, output: Path | None, options: Options, data: Path | None, dry_run: bool = False
) -> Path:
    """Prints what `options` lead to, from names and shapes alone; returns where the result will be. In a dry run, an
    output that would be refused is a note."""
    options.check()
    source = open_source(model)
    skeleton = source.skeleton()
    stacks = find_stacks(skeleton, find_family(skeleton))
    keep = chosen_depths(options, stacks)
    target = output or default_output(source, keep)
    notes = preview_target(target, source, options.overwrite, dry_run, is_pruned)
    console.print(bold(source.label), f", family {find_family(skeleton).name} -> {target}", sep="")
    rows = table("stack", "blocks", "kept", "16-bit", "after", right=("blocks", "kept", "16-bit", "after"))
    for stack, count in zip(stacks, keep, strict=True):
        size = 2 * _elements(skeleton.get_submodule(stack.name))
        after = size * count // stack.depth
        rows.add_row(stack.name, str(stack.depth), str(count), human_bytes(size), human_bytes(after))
    print_table(rows)
    device = pick_device(options.device)
    for label, words in _lines(options, stacks, keep, data, device, width_of(source.config)):
        console.print(f"  {label:<10}{words}")
    if Duration.parse(options.recover).is_none:
        _print_initialisation()
    for note in notes:
        console.print(note)
    return target


def print_result(folder: Path) -> None:
    """Prints the plan and the losses of a pruned model."""
    record = read_record(folder)
    plan = PrunePlan.from_dict(record["plan"])
    for stack in plan.stacks:
        console.print(f"{stack.name}: kept {', '.join(map(str, stack.kept))} of {stack.depth} ({plan.criterion})")
    rows = table("held-out loss", "diffusion", "to teacher", right=("diffusion", "to teacher"))
    names = {"teacher": "teacher", "pruned": "right after pruning", "recovered": "recovered"}
    for name, label in names.items():
        if name in record["losses"]:
            loss = record["losses"][name]
            rows.add_row(label, f"{loss['diffusion']:.5f}", f"{loss['output']:.5f}")
    print_table(rows)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in record["seconds"].items())
    console.print("wrote", bold(folder), f"({spent})")
    if not record["recovered"]:
        _print_initialisation()


def _lines(
    options: Options,
    stacks: tuple[Stack, ...],
    keep: tuple[int, ...],
    data: Path | None,
    device: torch.device,
    width: int,
) -> list[tuple[str, str]]:
    criterion = options.criterion if options.plan is None else f"plan {options.plan}"
    if options.plan is None and find_criterion(options.criterion).trains:
        groups = [g.name for stack, n in zip(stacks, keep, strict=True) for g in cut(stack, n, options.groups)]
        criterion += f", {Duration.parse(options.search)}, groups {' '.join(groups)}"
    generation = options.generation(device)
    kinds = {"features": "features and outputs of the teacher", "output": "outputs of the teacher", "none": "the data"}
    found = f"{generation.samples:,} samples of the teacher, {generation.steps} steps, guidance {generation.guidance:g}"
    return [
        ("criterion", criterion),
        ("data", found if data is None else f"latents in {data}"),
        ("recovery", f"{Duration.parse(options.recover)}, learning from {kinds[options.distill]}"),
        ("device", str(device)),
    ]


def _print_initialisation() -> None:
    console.print(
        bold("not recovered:", "yellow"), "this is an initialisation for training, not a model to sample with"
    )


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
