"""The rows of `low_bit.py`: what is compressed how, in which table."""

from __future__ import annotations

from typing import Any

TABLES = ("low-bit", "vq4dit-ablation", "hqdit-ablation", "svdquant-ablation", "explore")
ROWS: dict[str, dict[str, Any]] = {}

STEPS = 600  # training steps a block
HQ, SVD, VQ = "wfp4-ae2m1", "w4g64-a4g64", "wvq2"


def add(table: str, name: str, label: str, method: str, spec: str, distance: bool = False, **more: Any) -> None:
    """`more`: the method's parameters, and `modulation`, the step of the modulation layers."""
    modulation = more.pop("modulation", None)
    ROWS[name] = {
        "table": table, "label": label, "method": method, "spec": spec, "params": more, "modulation": modulation,
        "distance": distance,
    }  # fmt: skip


def vq_all(spec: str) -> dict[str, Any]:
    return {"method": "vq4dit", "spec": spec, "params": {"steps": STEPS}}


add("low-bit", "full", "full precision", "none", "", True)
add("low-bit", "w4a8-rtn", "W4A8, round to nearest", "rtn", "w4g64-a8tok", True)
add("low-bit", "w4a8-viditq", "W4A8, ViDiT-Q", "viditq", "w4g64-a8tok", True)
add("low-bit", "svdquant-w4a8", "W4A8, SVDQuant, rank 32", "svdquant", "w4g64-a8tok", True)
add("low-bit", "w4a4-rtn", "W4A4 int4 groups of 64, round to nearest", "rtn", "w4g64-a4g64", True)
add("low-bit", "fp4-rtn", "W4A4 FP4 per token, round to nearest", "rtn", f"{HQ}tok", True)
add("low-bit", "hqdit-token", "W4A4, HQ-DiT, per token", "hqdit", f"{HQ}tok", True)
add("low-bit", "hqdit-g16", "W4A4, HQ-DiT, blocks of 16", "hqdit", f"{HQ}g16", True)
add("low-bit", "hqdit-g32", "W4A4, HQ-DiT, blocks of 32", "hqdit", f"{HQ}g32", True)
add("low-bit", "hqdit-nvfp4", "W4A4, HQ-DiT, NVFP4", "hqdit", "wnvfp4g16-anvfp4g16", True)
add("low-bit", "hqdit-mxfp4", "W4A4, HQ-DiT, MXFP4", "hqdit", "wmxfp4g32-amxfp4g32", True)
add("low-bit", "svdquant-w4a4", "W4A4, SVDQuant, rank 32, int4 groups of 64", "svdquant", SVD, True)
add("low-bit", "svdquant-fp4", "W4A4, SVDQuant, rank 32, FP4 blocks of 16", "svdquant", f"{HQ}g16", True)
add("low-bit", "nf4", "W4A16, NF4", "rtn", "wnf4g64", True)
add("low-bit", "int3", "W3A16 int3 groups of 64, GPTQ + Hadamard", "viditq", "w3g64", True, rotate="always")
add("low-bit", "int3-gain", "W3A16 int3 groups of 64, the same, clipped, rows rescaled", "hqdit", "w3g64", True)
add("low-bit", "int3-rtn", "W3A16 int3 groups of 64, round to nearest", "rtn", "w3g64", True)
add("low-bit", "vq3", "W3A16, VQ4DiT", "vq4dit", "wvq3", True, steps=STEPS)
add("low-bit", "vq3-a8", "W3A8, VQ4DiT", "vq4dit", "wvq3-a8tok", True, steps=STEPS)
add("low-bit", "int2", "W2A16 int2 groups of 64, GPTQ + Hadamard", "viditq", "w2g64", True, rotate="always")
add("low-bit", "int2-gain", "W2A16 int2 groups of 64, the same, clipped, rows rescaled", "hqdit", "w2g64", True)
add("low-bit", "int2-rtn", "W2A16 int2 groups of 64, round to nearest", "rtn", "w2g64", True)
add("low-bit", "vq2", "W2A16, VQ4DiT", "vq4dit", VQ, True, steps=STEPS)
add("low-bit", "vq2-a8", "W2A8, VQ4DiT", "vq4dit", f"{VQ}-a8tok", True, steps=STEPS)
add(
    "low-bit", "vq2-all", "W2A16, VQ4DiT, modulation layers too", "vq4dit", VQ, True, steps=STEPS,
    modulation=vq_all(VQ),
)  # fmt: skip

for group in ("tok", "g16"):
    spec, to = f"{HQ}{group}", f"hqdit-{group}"
    add("hqdit-ablation", f"{to}-full", f"**HQ-DiT**, {group}", "hqdit", spec)
    add("hqdit-ablation", f"{to}-e2m1", "E2M1 for every row", "hqdit", spec, element="e2m1")
    add("hqdit-ablation", f"{to}-e1m2", "E1M2 for every row", "hqdit", spec, element="e1m2")
    add("hqdit-ablation", f"{to}-e3m0", "E3M0 for every row", "hqdit", spec, element="e3m0")
    add("hqdit-ablation", f"{to}-rule", "the paper's rule for the element", "hqdit", spec, element="rule")
    add("hqdit-ablation", f"{to}-noclip", "no clipping search", "hqdit", spec, clip="none")
    add("hqdit-ablation", f"{to}-clipout", "clipping search weighted by the inputs", "hqdit", spec, clip="output")
    add("hqdit-ablation", f"{to}-nohad", "no Hadamard", "hqdit", spec, hadamard=0)
    add("hqdit-ablation", f"{to}-had128", "Hadamard 128", "hqdit", spec, hadamard=128)
    add("hqdit-ablation", f"{to}-nogptq", "no GPTQ", "hqdit", spec, rounding="rtn")
    add("hqdit-ablation", f"{to}-biased", "weight rows not rescaled", "hqdit", spec, unbiased=False)
    add("hqdit-ablation", f"{to}-noise", "activation noise in the Gram matrix", "hqdit", spec, noise=True)

add("vq4dit-ablation", "vq2-full", "**VQ4DiT**", "vq4dit", VQ, steps=STEPS)
add("vq4dit-ablation", "vq2-nosteps", "no block training", "vq4dit", VQ, steps=0)
add("vq4dit-ablation", "vq2-plain", "no block training, nearest entries", "vq4dit", VQ, rounding="nearest", steps=0)
add("vq4dit-ablation", "vq2-nearest", "nearest entries, then trained", "vq4dit", VQ, rounding="nearest", steps=STEPS)
add("vq4dit-ablation", "vq2-candidates1", "codes fixed (1 candidate)", "vq4dit", VQ, candidates=1, steps=STEPS)
add("vq4dit-ablation", "vq2-candidates2", "2 candidates", "vq4dit", VQ, candidates=2, steps=STEPS)
add("vq4dit-ablation", "vq2-candidates4", "4 candidates", "vq4dit", VQ, candidates=4, steps=STEPS)
add("vq4dit-ablation", "vq2-noratio", "no ratio loss", "vq4dit", VQ, ratio=0.0, steps=STEPS)
add("vq4dit-ablation", "vq2-noharden", "no hardening on the way", "vq4dit", VQ, harden=1.1, steps=STEPS)
add("vq4dit-ablation", "vq2-noslope", "no slope loss", "vq4dit", VQ, slope=0.0, steps=STEPS)
add("vq4dit-ablation", "vq2-noimportance", "k-means without importance", "vq4dit", VQ, importance=False, steps=STEPS)
add("vq4dit-ablation", "vq2-noscale", "no scale a row", "vq4dit", VQ, scale=False, steps=STEPS)
add("vq4dit-ablation", "vq2-nohad", "no Hadamard", "vq4dit", VQ, hadamard=0, steps=STEPS)
add("vq4dit-ablation", "vq2-biased", "rows not rescaled, no training", "vq4dit", VQ, unbiased=False, steps=0)

add("svdquant-ablation", "svd-full", "**SVDQuant** W4A4, rank 32", "svdquant", SVD)
add("svdquant-ablation", "svd-r16", "rank 16", "svdquant", SVD, rank=16)
add("svdquant-ablation", "svd-r64", "rank 64", "svdquant", SVD, rank=64)
add("svdquant-ablation", "svd-g16", "int4 activations in groups of 16", "svdquant", "w4g64-a4g16")
add("svdquant-ablation", "svd-error", "branch from the rounding error", "svdquant", SVD, branch="error")
add("svdquant-ablation", "svd-nonoise", "no activation noise in the Gram matrix", "svdquant", SVD, noise=False)
add("svdquant-ablation", "svd-biased", "weight rows not rescaled", "svdquant", SVD, unbiased=False)
add("svdquant-ablation", "svd-nohad", "no Hadamard", "svdquant", SVD, hadamard=0)
add("svdquant-ablation", "svd-smooth", "scale searched, with Hadamard", "svdquant", SVD, smooth="search")
add("svdquant-ablation", "svd-paper", "scale searched, no Hadamard", "svdquant", SVD, smooth="search", hadamard=0)
add("svdquant-ablation", "svd-nogptq", "no GPTQ", "svdquant", SVD, rounding="rtn")
add("svdquant-ablation", "svd-round1", "one round", "svdquant", SVD, rounds=1)

for steps in (200, 2000):
    add("explore", f"explore-vq2-{steps}", f"VQ 2 bits, {steps} steps", "vq4dit", VQ, steps=steps)
for rate in (0.01, 0.02, 0.1):
    add("explore", f"explore-vq2-rate{rate}", f"VQ 2 bits, rate {rate}", "vq4dit", VQ, steps=STEPS, rate=rate)
for rate in (0.0005, 0.001, 0.01):
    add(
        "explore",
        f"explore-vq2-book{rate}",
        f"VQ 2 bits, codebook rate {rate}",
        "vq4dit",
        VQ,
        steps=STEPS,
        book_rate=rate,
    )
for slope in (0.1, 10.0):
    add("explore", f"explore-vq2-slope{slope}", f"VQ 2 bits, slope {slope}", "vq4dit", VQ, steps=STEPS, slope=slope)
for ratio in (0.1, 10.0):
    add("explore", f"explore-vq2-ratio{ratio}", f"VQ 2 bits, ratio {ratio}", "vq4dit", VQ, steps=STEPS, ratio=ratio)
add("explore", "explore-vq2-had16", "VQ 2 bits, Hadamard 16", "vq4dit", VQ, hadamard=16, steps=0)
add("explore", "explore-vq2-had128", "VQ 2 bits, Hadamard 128", "vq4dit", VQ, hadamard=128, steps=0)
add("explore", "explore-vq3-0", "VQ 3 bits, no training", "vq4dit", "wvq3", steps=0)
add("explore", "explore-vq3-biased", "VQ 3 bits, no training, biased", "vq4dit", "wvq3", unbiased=False, steps=0)
for tag in ("w2g64", "w3g64", "w4g64-a8tok"):
    for unbiased in (False, True):
        add(
            "explore", f"explore-{tag}-{unbiased}", f"{tag} unbiased={unbiased}", "hqdit", tag, clip="none",
            unbiased=unbiased,
        )  # fmt: skip
add("explore", "explore-hq-sweeps", "HQ-DiT per token, 2 sweeps", "hqdit", f"{HQ}tok", sweeps=2)
add("explore", "explore-hq-w4", "int4 g64, FP4 activations per token", "hqdit", "w4g64-ae2m1tok", clip="none")
add("explore", "explore-hq-int4", "int4 g64, int4 activations of 16", "hqdit", "w4g64-a4g16", clip="none")
add("explore", "explore-hq-int4tok", "int4 g64, int4 activations per token", "hqdit", "w4g64-a4tok", clip="none")
add("explore", "explore-svd-e2m1g16", "SVD int4, FP4 activations of 16", "svdquant", "w4g64-ae2m1g16")
add("explore", "explore-svd-a8-error", "SVD W4A8 from the error", "svdquant", "w4g64-a8tok", branch="error")
add("explore", "explore-svd-a8-biased", "SVD W4A8 biased", "svdquant", "w4g64-a8tok", unbiased=False)
add("explore", "explore-svd-a8-r8", "SVD W4A8 8 rounds", "svdquant", "w4g64-a8tok", rounds=8)
add("explore", "explore-svd-g32", "SVD W4A4 groups of 32", "svdquant", "w4g64-a4g32")
add("explore", "explore-ditas-r32", "DiTAS W4A8", "ditas", "w4g64-a8tok")
