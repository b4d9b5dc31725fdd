"""Writing a pruned model: an ordinary diffusers checkpoint with fewer blocks, and a sidecar on how it came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.checkpoint import read_json
from ..runtime.lineage import SIDECAR, is_pruned
from ..runtime.source import Source
from ..runtime.writer import staged_around, write_json, write_tensors
from .plan import PrunePlan
from .student import source_name

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def write_pruned(
    source: Source,
    plan: PrunePlan,
    student: nn.Module,
    record: dict[str, Any],
    work: Path,
    output: Path,
    overwrite: bool,
) -> None:
    """Writes `output`, shaped like the source: a pipeline folder for a pipeline, else a transformer folder
    with the scheduler of the source, where there is one.

    Tensors keep the dtypes of the source. Pictures in `work` come along, beside the model.
    """
    kept, headers = plan.kept_blocks(), source.checkpoint.headers
    tensors = student.state_dict()
    dtypes = {name: _DTYPES.get(headers[source_name(name, kept)][1], torch.float32) for name in tensors}
    entries = {name: (tuple(t.shape), dtypes[name]) for name, t in tensors.items()}
    with staged_around(source, output, overwrite, is_pruned) as target:
        write_tensors(target, entries, lambda name: tensors[name].detach().to(dtypes[name]).cpu())
        write_json(target / "config.json", {**source.config, **plan.depths})
        write_json(target / SIDECAR, record)
        for path in sorted(work.glob("*.png")):
            ((target.parent if source.is_pipeline else target) / path.name).write_bytes(path.read_bytes())


def read_record(folder: str | Path) -> dict[str, Any]:
    """The sidecar of a pruned pipeline or transformer folder. Raises InputError when there is none."""
    path = Path(folder)
    inside = path / "transformer" / SIDECAR
    return read_json(inside if inside.exists() else path / SIDECAR)
