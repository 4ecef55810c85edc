"""Parts that every command has: its options and help, progress, JSON, and the command for the record."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layer_surgery.cli.completion import Completed
from layer_surgery.cli.help import GroupedCommand
from layer_surgery.cli.options import AS_JSON, DEBUG, NO_EVAL, F, given, options_of
from layer_surgery.config import PerplexityConfig
from layer_surgery.config.declaring import Options
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.progress import Ui
from layer_surgery.records.provenance import portable_command

T = TypeVar("T")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def command_on_model(
    config: type[Options], *, required: tuple[str, ...] = (), examples: Mapping[str, str]
) -> Callable[[F], click.Command]:
    """Return a decorator that makes a command of MODEL and a configuration.

    Args:
        required: names of fields.
        examples: see `GroupedCommand`.
    """

    def decorate(function: F) -> click.Command:
        own = [options_of(config, required=required), *[NO_EVAL] * issubclass(config, PerplexityConfig)]
        for option in (DEBUG, AS_JSON, *reversed(own), click.argument("model", type=Completed(paths="dir"))):
            function = option(function)
        return click.command(cls=GroupedCommand, context_settings=CONTEXT, examples=examples)(function)

    return decorate


def check_complete(failures: list[Any]) -> None:
    """Have the command fail, after all that was found has been printed, if an evaluation did."""
    if failures:
        raise LayerSurgeryError("; ".join(f"{failure.stage} failed: {failure.error}" for failure in failures))


@contextmanager
def progress_ui() -> Iterator[Ui]:
    """Progress bars and notes on stderr; bars only where stderr is a terminal."""
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


def call(function: Callable[..., T], target: str, options: dict[str, Any]) -> T:
    """Call a function of the Python interface with the options that were given, and the command for the record."""
    command = portable_command(["layer-surgery", *sys.argv[1:]])
    with progress_ui() as ui:
        return function(target, ui=ui, command=command, **given(options))
