"""Whether a checkpoint holds the tensors of the model that its config describes, all of them and no others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from ..quantize.errors import InputError

Header = tuple[tuple[int, ...], str]


def check_complete(model: nn.Module, headers: Mapping[str, Header], label: str, first: Iterable[str] = ()) -> None:
    """Raises InputError for a tensor of the model that the file lacks or holds in another shape, and for one of the
    file that the model does not have, but for what loading makes up or leaves out itself.

    model    a skeleton on the meta device, or a model in memory
    headers  tensor name -> (shape, dtype) of the file
    first    names that the message prefers where several differ
    """
    state = model.state_dict()
    wrong: dict[str, str] = {}
    for name in dict.fromkeys([*first, *state]):
        if name not in headers:
            if name not in state or state[name].is_meta:  # a buffer that is not on meta has its value
                wrong[name] = "the file holds no such tensor"
        elif name in state and headers[name][0] != tuple(state[name].shape):
            wrong[name] = f"the config says {list(state[name].shape)}, the file holds {list(headers[name][0])}"
    for name in strangers(model, headers):
        wrong[name] = f"the file holds it ({list(headers[name][0])}), the config describes a model without it"
    if wrong:
        name, what = next(iter(wrong.items()))
        rest = f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else ""
        raise InputError(f"{label}: config and weights disagree: {name}: {what}{rest}")


def strangers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names`, the tensors of a file, that the model does not have, but for what loading leaves out itself."""
    ignored = getattr(type(model), "_keys_to_ignore_on_load_unexpected", None) or ()
    # older versions stored buffers that a model computes itself by now
    known = {*model.state_dict(), *(name for name, _ in model.named_buffers(remove_duplicate=False))}
    return [n for n in names if n not in known and not any(re.search(pattern, n) for pattern in ignored)]
