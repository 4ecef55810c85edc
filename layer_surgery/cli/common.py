"""What every command does alike: help with names, progress, JSON, and how options become arguments."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layer_surgery.config import DEFAULT_METHOD, CompressConfig

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

F = TypeVar("F", bound=Callable[..., Any])


def combine(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return a decorator that adds all `options`, shown in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def comma_list(kind: Callable[[str], Any], what: str = "", example: str = "") -> Callable[..., tuple[Any, ...] | None]:
    """Return a callback for an option with several values between commas, which may also be given several times.

    The option's value is then a tuple; None if it was not given.

    Args:
        kind: makes a value of text; raises `ValueError` for what it is not.
        what, example: for the message in that case.
    """

    def values(_context: click.Context, _parameter: click.Parameter, given: Any) -> tuple[Any, ...] | None:
        if given is None or given == ():
            return None
        text = given if isinstance(given, str) else ",".join(given)
        try:
            return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise click.BadParameter(f"'{text}' is not a list of {what}; give for example {example}.") from None

    return values


class WithNames(click.Command):
    """A command whose help ends with the registered scorers and methods.

    They are looked up only when help is asked for, because importing torch takes seconds.
    """

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from layer_surgery.scoring import SCORERS
        from layer_surgery.surgeon import METHODS

        default = CompressConfig()
        options = {option.name for option in self.params}
        registries: list[tuple[str, Any, str]] = [
            ("scorer", SCORERS, default.scorer),
            ("method", METHODS, DEFAULT_METHOD),
        ]
        for kind, registry, chosen in registries:
            if kind not in options:
                continue
            rows = [
                (entry.name + (" (default)" if entry.name == chosen else ""), f"{entry.summary} {entry.source}".strip())
                for entry in registry
            ]
            with formatter.section(f"{kind.capitalize()}s"):
                formatter.write_dl(rows)


def check_complete(failures: list[Any]) -> None:
    """Have the command fail, after all that was found has been printed, if an evaluation did."""
    from layer_surgery.errors import LayerSurgeryError

    if failures:
        raise LayerSurgeryError("; ".join(f"{failure.stage} failed: {failure.error}" for failure in failures))


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Leave out options whose default lives in the configuration."""
    return {name: value for name, value in options.items() if value is not None or name == "eval_data"}


@contextmanager
def progress_ui() -> Iterator[Any]:
    """Progress bars and notes on stderr; bars only where stderr is a terminal."""
    from layer_surgery.progress import Ui

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
        task = bars.add_task(what, total=total)
        try:
            yield lambda: bars.advance(task)
        finally:
            bars.remove_task(task)

    with bars:
        yield Ui(progress=progress, note=lambda text: console.print(text, style="dim", markup=False))


def print_json(data: Any) -> None:
    """Print data as JSON on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def command_line() -> str:
    """Return the command that was given, for the record."""
    return shlex.join(["layer-surgery", *sys.argv[1:]])
