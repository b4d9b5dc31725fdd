"""Choose, for every op, between the torch reference and its Triton twin, and keep the reason.

The reference *is* the definition of an op; a twin in `_triton/` is only ever a faster way to the same numbers. Nothing
here runs on CPU tensors: torch's own dispatcher sends those to the reference. `explain` answers without running. A
vendor's library comes first where it has the faster product (`LIBRARIES`).

Environment: `VDIT_KERNELS` = auto | triton | reference, `VDIT_STRICT` = 1 to refuse every fallback on an accelerator,
`VDIT_LAUNCH_TABLES` = folder of this machine's own launch tables, `VDIT_OVERLAP` = 1 to start kernels early.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .op import as_written
from .twins import LIBRARIES, TWINS

logger = logging.getLogger("vdit_quant")

MODES = ("auto", "triton", "reference")


class SettingError(ValueError):
    """A kernel setting, perhaps from the environment, has no such value."""


class KernelUnavailable(RuntimeError):
    """The Triton twin of an op cannot run and falling back was refused."""


class Refusal(Exception):
    """A vendor's library found that it has nothing for the tensors it was given."""


@dataclass(frozen=True)
class Settings:
    """`auto`: a library, Triton or else the reference. `triton`: Triton or an error. `reference`: never a kernel.

    `strict` turns every run of a reference on an accelerator into `KernelUnavailable`.
    """

    mode: str = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingError(f"kernel mode (VDIT_KERNELS) must be one of {', '.join(MODES)}, found {self.mode!r}")


@dataclass(frozen=True)
class Choice:
    """Which implementation of `op` runs, and why; `note`: which of its forms, where that is not the best it has."""

    op: str
    backend: str
    reason: str
    note: str | None = None


@dataclass
class _Process:
    settings: Settings | None = None
    fallbacks: dict[str, set[str]] = field(default_factory=dict)
    broken: dict[tuple[str, torch.device], str] = field(default_factory=dict)


def _from_environment() -> Settings:
    return Settings(os.environ.get("VDIT_KERNELS", "").strip().lower() or "auto", is_on("VDIT_STRICT"))


def is_on(name: str) -> bool:
    """Whether a setting of the environment is switched on."""
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def table_folder() -> Path:
    """Where this machine's own launch tables are (see `launch_table.py`). Raises SettingError without a home."""
    if named := os.environ.get("VDIT_LAUNCH_TABLES", "").strip():
        return Path(named)
    try:
        return Path.home() / ".cache" / "vdit-quant" / "tables"
    except RuntimeError:
        raise SettingError("no home directory for launch tables: name a folder in VDIT_LAUNCH_TABLES") from None


_process = _Process()
_override: ContextVar[Settings | None] = ContextVar("vdit_quant_kernel_settings", default=None)


def settings() -> Settings:
    """The settings in force here: those of the innermost `use`, else the process-wide ones."""
    if _process.settings is None:
        _process.settings = _from_environment()
    return _override.get() or _process.settings


def _changed(base: Settings, mode: str | None, strict: bool | None) -> Settings:
    return replace(
        base, mode=base.mode if mode is None else mode, strict=base.strict if strict is None else bool(strict)
    )


def configure(mode: str | None = None, strict: bool | None = None) -> Settings:
    """Change the process-wide settings; what is None stays."""
    _process.settings = _changed(_process.settings or _from_environment(), mode, strict)
    return _process.settings


@contextmanager
def use(mode: str | None = None, strict: bool | None = None) -> Iterator[Settings]:
    """Change the settings inside a `with` block, in this thread only."""
    token = _override.set(_changed(settings(), mode, strict))
    try:
        yield settings()
    finally:
        _override.reset(token)


def fallbacks() -> dict[str, set[str]]:
    """Op -> reasons, for the fallbacks that really happened on an accelerator in this process; also files in Gluon in
    whose place portable kernels run, and classes of blocks whose own forward runs."""
    return {op: set(reasons) for op, reasons in _process.fallbacks.items()}


def remember(what: str, reason: str, message: str, *words: object) -> None:
    """Keeps a reason for `fallbacks`, and logs it (%-format) the first time."""
    known = _process.fallbacks.setdefault(what, set())
    if reason not in known:
        known.add(reason)
        logger.warning(message, *words)


def triton_version() -> str | None:
    """Version of the installed Triton, or None."""
    try:
        return str(importlib.import_module("triton").__version__)
    except (ImportError, AttributeError):
        return None


@cache
def _twin(op: str) -> ModuleType | str:
    """The imported twin module, or the reason why it cannot be imported."""
    if op not in TWINS:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(sorted(TWINS))}")
    if triton_version() is None:
        return "triton is not installed"
    try:
        return importlib.import_module(f"._triton.{TWINS[op]}", __package__)
    except Exception as error:
        # Triton raises far more than ImportError while it starts (missing driver, compiler, libcuda).
        return f"the Triton kernel does not import: {type(error).__name__}: {error}"


@cache
def _device_reason(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "CPU tensor: the torch reference runs"
    if device.type != "cuda":
        return f"device type {device.type!r} has no Triton kernels here"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability < 8.0"
    return None


def indexed(device: torch.device) -> torch.device:
    """The same with a number, by which a failure on it is remembered."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())


def blocker(op: str, device: torch.device) -> str | None:
    """Why Triton cannot run `op` on `device`, whatever the shapes; None when it can."""
    if (reason := _device_reason(device)) is not None:
        return reason
    if isinstance(twin := _twin(op), str):
        return twin
    return _process.broken.get((op, device))


def _library(op: str) -> tuple[str, ModuleType] | None:
    """Name and module of the vendor's implementation of `op`, when there is one and the mode allows it."""
    if op not in LIBRARIES or settings().mode != "auto":
        return None
    backend, module = LIBRARIES[op]
    return backend, importlib.import_module(f".{module}", __package__)


def explain(op: str, device: torch.device | str, **facts: Any) -> Choice:
    """Say what would run, without running it.

    `facts` are the ones a kernel may refuse: `dtype` (of the activation), `out_dtype`, `k`, `n`, `group`,
    `block_size` (hadamard), `width` (head_norm_rope), `head_dim` (attention).
    """
    if op not in TWINS:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(sorted(TWINS))}")
    device = indexed(torch.device(device))
    mode = settings().mode
    if mode == "reference" and device.type != "cpu":
        return Choice(op, "reference", "the mode is 'reference'")
    library = _library(op)
    if library and _device_reason(device) is None and library[1].limits(op, device=device, **facts) is None:
        return Choice(op, library[0], "supported", _note(op, device, facts))
    reason = blocker(op, device)
    if reason is None:
        reason = _twin(op).limits(op, device=device, **facts)  # type: ignore[union-attr]
    if reason is not None:
        return Choice(op, "reference", reason)
    reason = "the mode is 'triton'" if mode == "triton" else "supported"
    return Choice(op, "triton", reason, _note(op, device, facts))


def _note(op: str, device: torch.device, facts: dict[str, Any]) -> str | None:
    found = getattr(_twin(op), "note", None)
    return None if found is None else found(op, device, **facts)


def tunable() -> list[str]:
    """The ops whose launch options can be measured; none where Triton cannot be imported."""
    return [op for op in TWINS if op in getattr(_twin(op), "TUNABLE", ())]


def twin(op: str) -> ModuleType:
    """The Triton twin of `op`. Raises KernelUnavailable when it cannot be imported."""
    if isinstance(found := _twin(op), str):
        raise KernelUnavailable(f"{op}: {found}")
    return found


def available() -> Choice:
    """Whether Triton kernels can run in this process at all, and why not."""
    if settings().mode == "reference":
        return Choice("*", "reference", "the mode is 'reference'")
    if (version := triton_version()) is None:
        return Choice("*", "reference", "triton is not installed")
    if (reason := _device_reason(torch.device("cuda"))) is not None:
        return Choice("*", "reference", reason)
    return Choice("*", "triton", f"triton {version}")


def run(op: str, reference: Callable[..., Any], *args: Any) -> Any:
    """Run `op` on accelerator tensors: a vendor's library or the Triton twin when allowed and supported, else
    `reference(*args)`."""
    device = args[0].device
    current = settings()
    if current.mode == "reference" and not current.strict:
        return as_written(reference)(*args)
    library = _library(op)
    if library and library[1].supports(op, *args) is None:
        with suppress(Refusal):  # the Triton twin takes what the library turns out not to
            return _launch(library[1].run, op, device, args)
    reason = "the mode is 'reference'" if current.mode == "reference" else blocker(op, device)
    if reason is None:
        twin = _twin(op)
        reason = twin.supports(op, *args)  # type: ignore[union-attr]
    if reason is None:
        try:
            return _launch(twin.run, op, device, args)  # type: ignore[union-attr]
        except Exception as error:
            # A kernel that does not compile or does not fit this GPU is a reason; any other error is a bug to see.
            if not type(error).__module__.startswith("triton"):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            _process.broken[op, device] = reason
            if library:  # which was passed over for the kernel, and takes its place
                remember(op, reason, "%s runs without its Triton kernel on %s: %s", op, device, reason)
                return run(op, reference, *args)
    return _fall_back(op, reason, reference, args)


def _launch(call: Callable[..., Any], op: str, device: torch.device, args: tuple[Any, ...]) -> Any:
    # Triton launches on the current device, which need not be the tensor's.
    if device.index == torch.cuda.current_device():
        return call(op, *args)
    with torch.cuda.device(device):
        return call(op, *args)


def _fall_back(op: str, reason: str, reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    current = settings()
    if current.strict or current.mode == "triton":
        raise KernelUnavailable(f"{op}: the Triton kernel cannot run and falling back is refused: {reason}")
    remember(op, reason, "%s runs its torch reference on %s: %s", op, args[0].device, reason)
    return as_written(reference)(*args)
