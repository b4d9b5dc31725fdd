"""Any model without a file of its own, also one that is not from diffusers: roles guessed from the module graph.

Blocks are the ModuleLists whose children all have one class and hold linear layers; of a list of one, the child must
look like a block by itself. Inside them a layer's name tells its role; outside them every layer keeps its precision.
"""

from __future__ import annotations

import re

from torch import nn

from ..attach import linear_layers
from ..family import Family, block_of

# The names that diffusers models and common forks give to each part of a block, tried in this order.
_ROLES = (
    (r"(^|[._])(t|time|timestep|class|label|text|caption|pos|patch)?_?emb(ed|edder|edding)?s?([._]|$)", "embedder"),
    (r"(norm\d*(_context)?|mod(ulation)?|(img|txt)_mod|ada_?ln\w*|scale_shift\w*)([._]|$)", "modulation"),
    (r"(attn|attention|to_[qkv]|to_out|qkv|add_[qkv]_proj)", "attention"),
    (
        r"(ff|mlp|ffn|feed_?forward|fc\d|net|linear_in|linear_out|proj_mlp|proj_out|w[123]|(gate|up|down)_proj)",
        "feed_forward",
    ),
)


class Generic(Family):
    def matches(self, model: nn.Module) -> bool:
        return True

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:
        found: list[str] = []
        for name, module in model.named_modules():
            nested = any(name.startswith(outer + ".") for outer in found)
            if isinstance(module, nn.ModuleList) and not nested and _is_block_list(module):
                found.append(name)
        return tuple(found)

    def linears(self, model: nn.Module) -> dict[str, str]:
        blocks = self.block_names(model)
        return {name: _guess(name, block_of(name, blocks)) for name in linear_layers(model)}

    def role(self, name: str, model: nn.Module) -> str:
        return _guess(name, block_of(name, self.block_names(model)))


def _is_block_list(modules: nn.ModuleList) -> bool:
    kinds = {type(m) for m in modules}
    holds = any(isinstance(m, nn.Linear) for m in modules.modules())
    alike = len(kinds) == 1 and holds and not kinds & {nn.Linear}
    return alike and (len(modules) > 1 or _is_block(modules[0]))


def _is_block(module: nn.Module) -> bool:
    """Whether a module that no like one stands beside is a block: embedders, projections and heads stand alone too, and
    so does a whole model that holds blocks."""
    roles = {_role(name) for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    kind = type(module).__name__
    if kind.endswith("Block") and "emb" not in kind.lower():
        return not roles.isdisjoint({"attention", "feed_forward"})
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    holds_blocks = any(_is_block(m) for modules in lists for m in modules)
    return len(roles & {"attention", "feed_forward", "modulation"}) > 1 and not holds_blocks


def _guess(name: str, block: str | None) -> str:
    if block is None:
        return "other"
    return _role(name.removeprefix(block + "."))


def _role(local: str) -> str:
    """The role of a layer by its name inside its block."""
    return next((role for pattern, role in _ROLES if re.search(pattern, local, re.IGNORECASE)), "other")


FAMILY = Generic(name="generic", classes=(), blocks=(), roles=())
