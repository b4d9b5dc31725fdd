"""What each part of the calibrated methods brings: one part on or off at a time, paired PSNR, several seeds.

    python benchmarks/ablation.py MODEL --samples 200 --guidance 1.5 --name cifar-ablation \\
        --json benchmarks/results/cifar-ablation.json --markdown docs/methods/viditq.md

The figures are those of `quality.py`, which this script calls; the table gives the difference to the full method.
"""

from __future__ import annotations

import json
from typing import Any

import quality

GROUPS: dict[str, tuple[tuple[str, str], ...]] = {
    "viditq": (
        ("round to nearest", "w4a8:rtn"),
        ("**ViDiT-Q, the default** (Hadamard 64 where it helps, GPTQ)", "w4a8"),
        ("Hadamard everywhere", "w4a8:viditq:rotate=always"),
        ("no Hadamard", "w4a8:viditq:hadamard=0"),
        ("no GPTQ", "w4a8:viditq:rounding=rtn"),
        ("scale, alpha searched, max over time, folded", "w4a8:viditq:smooth=search"),
        ("the same, not folded", "w4a8:viditq:smooth=search,fold=false"),
        ("scale, mean over time instead of max", "w4a8:viditq:smooth=search,aggregate=mean"),
        ("scale, first steps instead of max over time", "w4a8:viditq:smooth=search,aggregate=first"),
        ("scale, alpha 0.5 instead of the search", "w4a8:viditq:smooth=fixed"),
        ("scale, no Hadamard", "w4a8:viditq:smooth=search,hadamard=0"),
        ("Hadamard 128 where it helps", "w4a8:viditq:hadamard=128"),
        ("regular Hadamard where it helps", "w4a8:viditq:kind=regular"),
        ("GPTQ without act-order", "w4a8:viditq:act_order=false"),
        ("2 sweeps of coordinate descent after GPTQ", "w4a8:viditq:sweeps=2"),
        ("clip search, weighted by the inputs", "w4a8:viditq:clip=output"),
        ("modulation at 4 bits too", "w4a8-mod4"),
    ),
    "rotation": (
        ("round to nearest", "w4a8:rtn"),
        ("**rotated where the layer errs less so, the default**", "w4a8"),
        ("rotated everywhere", "w4a8:viditq:rotate=always"),
        ("no rotation", "w4a8:viditq:hadamard=0"),
    ),
    "ditas": (
        ("round to nearest", "w4a8:rtn"),
        ("**DiTAS** (scale searched, folded, rank 32, GPTQ)", "w4a8:ditas"),
        ("no low rank", "w4a8:ditas:rank=0"),
        ("rank 16", "w4a8:ditas:rank=16"),
        ("no scale", "w4a8:ditas:smooth=none"),
        ("alpha 0.5 instead of the search", "w4a8:ditas:smooth=fixed,alpha=0.5"),
        ("first steps instead of max over time", "w4a8:ditas:aggregate=first"),
        ("no GPTQ (the paper's rounding)", "w4a8:ditas:rounding=rtn"),
        ("no GPTQ, 10 rounds", "w4a8:ditas:rounding=rtn,rounds=10"),
        ("one round", "w4a8:ditas:rounds=1"),
    ),
}


def main() -> None:
    parser = quality.arguments()
    parser.add_argument("--group", choices=GROUPS, default="viditq", help="which method's parts to switch")
    options = parser.parse_args()
    options.variant = [variant for _, variant in GROUPS[options.group]]
    if not options.render:
        found = quality.benchmark(options)
        found["group"] = options.group
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = render(json.loads(options.json.read_text(encoding="utf-8")))
    for document in options.markdown:
        quality.rewrite(document, options.name, table)
    print(table)


def render(found: dict[str, Any]) -> str:
    """The table: each variant's PSNR and its difference to the method as shipped (the row in bold)."""
    labels = {variant: label for label, variant in GROUPS[found["group"]]}
    full = next(row for row in found["rows"] if labels[row["variant"]].startswith("**"))
    rows = [
        "| | PSNR, dB | difference | bits a weight | calibrated in |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        rows.append(
            f"| {labels[row['variant']]} | {row['psnr']:.2f} ± {row['psnr_spread']:.2f} "
            f"| {row['psnr'] - full['psnr']:+.2f} | {16 * row['ratio']:.2f} | {row['calibration_seconds']:.0f} s |"
        )
    return "\n".join([quality.caption(found), "", *rows])


if __name__ == "__main__":
    main()
