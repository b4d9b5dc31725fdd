"""`vdit-quant`: every file in `commands/` is one command."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from importlib import metadata

import typer

from . import commands

app = typer.Typer(
    help="Compress Diffusion Transformers: calibrate a checkpoint, prove what it cost, run the result.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(metadata.version("vdit-quant"))
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Options before the command."""


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a line on stderr when it is interrupted: typer would end the process without a word."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            from .console import error_console

            error_console.print("; ".join(["interrupted", *map(str, stop.args)]), soft_wrap=True)
            sys.exit(130)

    return run


for _module in sorted(m.name for m in pkgutil.iter_modules(commands.__path__)):
    app.command(_module)(_interruptible(importlib.import_module(f"{commands.__name__}.{_module}").run))


def main() -> None:
    """Entry point: bad input, or a refused fallback of a kernel, gives one line on stderr and exit code 2."""
    debug = "--debug" in sys.argv
    if debug and sys.argv.index("--debug") > 1:  # accepted anywhere on the line
        sys.argv.remove("--debug")
    try:
        app()
    except Exception as error:
        if debug or not _is_input_error(error):
            raise
        from .console import bold, error_console

        error_console.print(bold("error:", "red"), str(error), soft_wrap=True)
        sys.exit(2)


def _is_input_error(error: Exception) -> bool:
    kernels = "vdit_quant.kernels.dispatch"
    places = (("vdit_quant.quantize.errors", "InputError"), (kernels, "SettingError"), (kernels, "KernelUnavailable"))
    return any(place in sys.modules and isinstance(error, getattr(sys.modules[place], name)) for place, name in places)
