"""Parts that every command has: its options and help, progress, and the command for the record."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from layer_surgery.cli import stopping
from layer_surgery.cli.completion import Completed
from layer_surgery.cli.help import GroupedCommand
from layer_surgery.cli.options import AS_JSON, DEBUG, NO_EVAL, QUIET, QUIET_KEY, F, given, options_of
from layer_surgery.cli.progress import progress_ui
from layer_surgery.cli.terminal import HarmlessConsole
from layer_surgery.config import PerplexityConfig
from layer_surgery.config.declaring import Options
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.records.provenance import portable_command

T = TypeVar("T")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def command_on_model(
    config: type[Options], *, required: tuple[str, ...] = (), examples: Mapping[str, str], metavar: str = "MODEL"
) -> Callable[[F], click.Command]:
    """Return a decorator that makes a command of MODEL and a configuration.

    Args:
        metavar: what help texts write in the place of MODEL.
        required: names of fields.
        examples: see `GroupedCommand`.
    """

    def decorate(function: F) -> click.Command:
        own = [options_of(config, required=required), *[NO_EVAL] * issubclass(config, PerplexityConfig)]
        for option in (
            DEBUG,
            QUIET,
            AS_JSON,
            *reversed(own),
            click.argument("model", metavar=metavar, type=Completed(paths="dir")),
        ):
            function = option(function)
        return click.command(cls=GroupedCommand, context_settings=CONTEXT, examples=examples)(function)

    return decorate


def check_complete(failures: list[Any]) -> None:
    """Have the command fail, after all that was found has been printed, if an evaluation did."""
    if failures:
        raise LayerSurgeryError("; ".join(f"{failure.stage} failed: {failure.error}" for failure in failures))


def call(function: Callable[..., T], target: str, options: dict[str, Any]) -> T:
    """Call a function of the Python interface with the options that were given, and the command for the record.

    Progress and notes go to stderr, unless `--quiet` is given.
    """
    command = portable_command(["layer-surgery", *sys.argv[1:]])
    stopping.stop_by_cleaning_up()
    if click.get_current_context().meta.get(QUIET_KEY):
        return function(target, command=command, **given(options))
    console = HarmlessConsole(stderr=True, highlight=False, soft_wrap=True)
    with progress_ui(console) as ui:
        return function(target, ui=ui, command=command, **given(options))
