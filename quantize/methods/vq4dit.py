"""VQ4DiT (Deng et al. 2024, arXiv 2408.17131): weights as codes of a small codebook, calibrated block by block.

    w[n, j d : (j + 1) d] ~= C[code[n, j]] * s[n]

Per layer: k-means whose squared errors count as much as their inputs (second moments), then codes chosen one run of
columns after the other with the error fed back into the columns that follow (`rounding = "nearest"`: without). Per
block, where `steps` is not 0: codebook, scales, biases and codes are trained on the block's output (see
`calibrate/block_tuning.py`, which reads the parameters from `steps` on). Both learn from nothing but noise and
conditions. Differences from the paper, on purpose: a row's scale and a rotation before the codebook, error feedback,
importance, a codebook in int8, and blocks that learn from the inputs that the compressed blocks before them give.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from .. import formats, registry
from ..compose import BOUNDS, Choices, compress_linear
from ..format import Tensors
from ..gptq import DAMP
from ..method import AUTO, FloatLayer, Method
from ..rotate import default_block
from ..spec import HadamardSpec, LayerSpec
from ..stats import LayerStats
from ..vector import VectorFormat, VectorRounding

_TRAINING = frozenset({"candidates", "ratio", "harden", "slope", "rate", "book_rate"})


class Vq4Dit(Method):
    """`hadamard`: the largest block of a rotation, 0 for none. `scale`: a scale for each row before the codebook.

    steps       training steps a block, 0 for none; auto: as many as pay off where that takes minutes, else none (see
                `calibrate/trained_blocks.py`)
    candidates  entries that a code may become: those nearest to its own
    ratio       weight of the loss that drives every mixture of candidates to one of them
    harden      the share that a candidate must reach to be fixed before the end; above 1: never
    slope       weight of the loss that holds the block's output, projected on the exact output, at its exact size
    rate        learning rate of the mixtures' logits
    book_rate   learning rate of codebook (its root mean square is 1), scales (as factors) and biases
    """

    defaults: ClassVar[dict[str, Any]] = {
        "hadamard": 64,
        "scale": True,
        "importance": True,
        "rounding": "gptq",
        "damp": DAMP,
        "unbiased": True,
        "steps": AUTO,
        "candidates": 3,
        "ratio": 1.0,
        "harden": 0.99,
        "slope": 1.0,
        "rate": 0.05,
        "book_rate": 0.003,
    }

    choices: ClassVar[dict[str, tuple[str, ...]]] = {"rounding": ("nearest", "gptq")}
    bounds: ClassVar[dict[str, tuple[float, float]]] = {
        **{name: BOUNDS[name] for name in ("hadamard", "damp")},
        "steps": (0, math.inf),
        "candidates": (1, 64),
        "ratio": (0.0, math.inf),
        "harden": (0.0, math.inf),
        "slope": (0.0, math.inf),
        "rate": (0.0, math.inf),
        "book_rate": (0.0, math.inf),
    }
    autos: ClassVar[dict[str, tuple[int, int]]] = {"steps": (600, 0)}

    def complete(self, spec: LayerSpec, n: int, k: int, params: dict[str, Any], foldable: bool = False) -> LayerSpec:
        if params["hadamard"] and spec.hadamard is None:
            spec = dataclasses.replace(spec, hadamard=HadamardSpec(default_block(k, "sylvester", params["hadamard"])))
        return spec

    def formats(self) -> tuple[str, ...]:
        names = registry.names(formats)
        return tuple(name for name in names if isinstance(registry.find(formats, name, "FORMAT"), VectorFormat))

    def needs(self, params: dict[str, Any]) -> frozenset[str]:
        return frozenset({"gram"})

    def block_steps(self, params: dict[str, Any]) -> int:
        return 0 if params["steps"] == AUTO else int(params["steps"])

    def unused(self, spec: LayerSpec, params: dict[str, Any]) -> frozenset[str]:
        found = frozenset() if params["rounding"] == "gptq" else frozenset({"damp"})
        return found if params["steps"] else found | _TRAINING

    def compress(self, layer: FloatLayer, stats: LayerStats | None, spec: LayerSpec, **params: Any) -> Tensors:
        feedback = params["rounding"] == "gptq"
        choices = Choices.of({**params, "rounding": "gptq" if feedback else "rtn"})
        shared = {name: params[name] for name in ("damp", "importance", "unbiased")}
        vectors = VectorRounding(feedback=feedback, scales=params["scale"], **shared)
        return compress_linear(layer, stats, spec, dataclasses.replace(choices, vectors=vectors))


METHOD = Vq4Dit()
