"""Parts that every command has: help with names, progress, and the command for the record."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layer_surgery.cli import stopping
from layer_surgery.cli.options import AS_JSON, DEBUG, NO_EVAL, F, given, options_of
from layer_surgery.cli.terminal import HarmlessConsole
from layer_surgery.config import DEFAULT_COMPONENTS, DEFAULT_METHOD, DEFAULT_SCORER, PerplexityConfig
from layer_surgery.config.declaring import Options
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.progress import Ui
from layer_surgery.records.provenance import portable_command
from layer_surgery.reporting.text import one_line

T = TypeVar("T")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Strict(click.Command):
    """A command that refuses an option which takes one value and is given several times; click takes the last."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, after a look at how often each option is among them."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in self.params:
            one = isinstance(option, click.Option) and not (option.multiple or option.is_flag or option.count)
            if one and given.count(option) > 1:
                raise click.UsageError(f"{option.opts[0]} is given {given.count(option)} times; give it once.", ctx)
        return super().parse_args(ctx, args)


class WithNames(Strict):
    """A command whose help ends with the registered scorers and methods.

    They are looked up only when help is asked for, because importing torch takes seconds.
    """

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from layer_surgery.scoring import SCORERS
        from layer_surgery.surgeon import METHODS
        from layer_surgery.surgeon.components import KINDS

        options = {option.name for option in self.params}
        registries: Any = (
            ("scorer", "Scorers", SCORERS, (DEFAULT_SCORER,)),
            ("method", "Methods", METHODS, (DEFAULT_METHOD,)),
            ("components", "Components", KINDS, DEFAULT_COMPONENTS),
        )
        for option, title, registry, chosen in registries:
            if option not in options:
                continue
            rows = [
                (entry.name + (" (default)" if entry.name in chosen else ""), f"{entry.summary} {entry.source}".strip())
                for entry in registry
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


def command_on_model(config: type[Options], *, required: tuple[str, ...] = ()) -> Callable[[F], click.Command]:
    """Return a decorator that makes a command of MODEL and a configuration; `required` names fields."""

    def decorate(function: F) -> click.Command:
        own = [options_of(config, required=required), *[NO_EVAL] * issubclass(config, PerplexityConfig)]
        for option in (DEBUG, AS_JSON, *reversed(own), click.argument("model")):
            function = option(function)
        return click.command(cls=WithNames, context_settings=CONTEXT)(function)

    return decorate


def check_complete(failures: list[Any]) -> None:
    """Have the command fail, after all that was found has been printed, if an evaluation did."""
    if failures:
        raise LayerSurgeryError("; ".join(f"{failure.stage} failed: {failure.error}" for failure in failures))


@contextmanager
def progress_ui() -> Iterator[Ui]:
    """Progress bars and notes on stderr; bars only where stderr is a terminal."""
    console = HarmlessConsole(stderr=True, highlight=False, soft_wrap=True)
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
        yield Ui(progress=progress, note=lambda text: console.print(one_line(text), style="dim", markup=False))


def call(function: Callable[..., T], target: str, options: dict[str, Any]) -> T:
    """Call a function of the Python interface with the options that were given, and the command for the record."""
    command = portable_command(["layer-surgery", *sys.argv[1:]])
    stopping.stop_by_cleaning_up()
    with progress_ui() as ui:
        return function(target, ui=ui, command=command, **given(options))
