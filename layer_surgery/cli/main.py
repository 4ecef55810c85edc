"""The command line: arguments to keyword arguments to `layer_surgery.api`. No mathematics."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from layer_surgery import __version__
from layer_surgery.cli.common import (
    CONTEXT,
    WithNames,
    check_complete,
    comma_list,
    command_line,
    given,
    print_json,
    progress_ui,
)
from layer_surgery.cli.evaluation_options import EVALUATION
from layer_surgery.cli.export import export
from layer_surgery.cli.options import CALIBRATION, REFIT, REMOVE, RUNTIME
from layer_surgery.cli.report import report as report_command
from layer_surgery.cli.sweep import sweep
from layer_surgery.config import BudgetConfig, EvaluationConfig


def main() -> NoReturn:
    """Run the command line; exit code 2 for a mistake in what was asked, 1 for a failure."""
    from layer_surgery.errors import LayerSurgeryError, describe

    debug = "--debug" in sys.argv
    _quiet_libraries(debug)
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="layer-surgery"))
    except click.ClickException as error:
        if len(sys.argv) == 1:  # the message is the help
            error.show()
        else:
            click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing half-written is left.", err=True)
        sys.exit(130)
    except LayerSurgeryError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        click.echo(f"error: {describe(error)} (--debug shows where)", err=True)
        sys.exit(1)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="layer-surgery")
def cli() -> None:
    """Make a causal language model smaller by removing its least important layers, and show what that costs.

    MODEL is a local directory or a hub name. Nothing is downloaded unless a hub name is given.
    """


@cli.command(cls=WithNames, context_settings=CONTEXT)
@click.argument("model")
@click.option("--target-layers", type=int, metavar="N", help="Number of layers left whole.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Directory for the compressed model.")
@click.option(
    "--keep",
    type=float,
    metavar="F",
    help="Fraction of the other layers' parameters to spend on low-rank components, 0 to 1; 0 removes the layers "
    f"outright.  [default: {BudgetConfig.DEFAULT_KEEP}]",
)
@click.option(
    "--target-parameters",
    type=float,
    metavar="F",
    help="The same budget as a fraction of all the model's parameters, instead of --keep.",
)
@click.option(
    "--layers",
    callback=comma_list(int, "layer numbers", "3,5,7"),
    metavar="I,J,...",
    help="The layers to operate on, counted from 0, instead of the scorer's choice.",
)
@REMOVE
@click.option("--scorer", default=None, metavar="NAME", help="How layers are ranked (see below).")
@click.option("--method", default=None, metavar="NAME", help="How low-rank components are made (see below).")
@REFIT
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Apply this plan, or the plan in this surgery.json, instead of making one.",
)
@CALIBRATION
@EVALUATION
@click.option("--dry-run", is_flag=True, help="Do everything but the writing.")
@click.option("--overwrite", is_flag=True, help="Replace the output directory if it holds a model already.")
@RUNTIME
def compress(model: str, no_eval: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Remove the least important layers of MODEL, put low-rank components in their place, and save the result."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_report
    from layer_surgery.runs.provenance import report_dict

    if no_eval:
        options["eval_data"] = None
    with progress_ui() as ui:
        report = api.compress(model, ui=ui, command=command_line(), **given(options))
    if as_json:
        print_json(report_dict(report))
    else:
        print_report(Console(highlight=False, soft_wrap=True), report)
    check_complete(report.failures)


@cli.command(cls=WithNames, context_settings=CONTEXT)
@click.argument("model")
@click.option("--scorer", default=None, metavar="NAME", help="How layers are ranked (see below).")
@click.option(
    "--target-layers",
    type=int,
    metavar="N",
    help="Choose the layers for this target (greedy and block scorers need it).",
)
@REMOVE
@CALIBRATION
@RUNTIME
def score(model: str, as_json: bool, debug: bool, **options: Any) -> None:
    """Rank the layers of MODEL by importance, the least important first."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_scores

    with progress_ui() as ui:
        scores = api.score(model, ui=ui, command=command_line(), **given(options))
    if as_json:
        print_json(asdict(scores))
    else:
        print_scores(Console(highlight=False, soft_wrap=True), scores)


@cli.command(context_settings=CONTEXT)
@click.argument("model")
@click.option(
    "--baseline", metavar="OTHER", help="A second model to measure on the same tokens, for example the original."
)
@EVALUATION
@click.option(
    "--sequence-length", default=EvaluationConfig.sequence_length, show_default=True, help="Tokens in a window."
)
@click.option("--text-column", metavar="NAME", help="Column that holds the text in a table file.")
@RUNTIME
def evaluate(model: str, no_eval: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Measure MODEL, alone or beside a baseline: size, perplexity, distance, tasks, speed and memory."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_evaluation

    if no_eval:
        options["eval_data"] = None
    with progress_ui() as ui:
        report = api.evaluate(model, ui=ui, command=command_line(), **given(options))
    if as_json:
        print_json(report.to_dict())
    else:
        print_evaluation(Console(highlight=False, soft_wrap=True), report, model)
    check_complete(report.failures)


for _command in (sweep, report_command, export):
    cli.add_command(_command)


def _quiet_libraries(debug: bool) -> None:
    """Keep the libraries' own chatter off the terminal: what matters is checked here and said once."""
    if debug:
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("layer_surgery").setLevel(logging.DEBUG)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of our own stand in the place of lm-eval's
    chatty = ("transformers", "lm_eval", "datasets", "huggingface_hub", "matplotlib", "torchao", "torch.utils._pytree")
    for name in chatty:
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
