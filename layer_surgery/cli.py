"""The command line: arguments to keyword arguments to `layer_surgery.api`. No mathematics."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layer_surgery import __version__
from layer_surgery.cli_evaluation import EVALUATION as _EVALUATION
from layer_surgery.cli_evaluation import combine as _options
from layer_surgery.config import (
    DEFAULT_METHOD,
    BudgetConfig,
    CalibrationConfig,
    CompressConfig,
    EvaluationConfig,
    RefitConfig,
    RuntimeConfig,
)

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


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


class _WithNames(click.Command):
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


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="layer-surgery")
def cli() -> None:
    """Make a causal language model smaller by removing its least important layers, and show what that costs.

    MODEL is a local directory or a hub name. Nothing is downloaded unless a hub name is given.
    """


def _layer_list(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"'{value}' is not a list of layer numbers; give for example 3,5,7.") from None


def _bytes(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"'{value}' is not a size; give for example 8GB or 500MiB.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


_REMOVE = click.option(
    "--remove",
    default=BudgetConfig.remove,
    show_default=True,
    metavar="layer|attention|mlp",
    help="Operate on whole layers, or only on their attention or their MLP; the budget is then of these.",
)
_RUNTIME = _options(
    click.option(
        "--device",
        default=RuntimeConfig.device,
        show_default=True,
        metavar="auto|cpu|cuda[:N]",
        help="Where to compute.",
    ),
    click.option(
        "--dtype",
        default=RuntimeConfig.dtype,
        show_default=True,
        metavar="auto|float32|bfloat16|float16",
        help="dtype of computation; auto is float32 on a CPU and the checkpoint's own on CUDA. The saved checkpoint "
        "always has the original's dtype.",
    ),
    click.option(
        "--batch-size",
        default=RuntimeConfig.batch_size,
        show_default=True,
        help="Sequences at a time; changes speed, not results.",
    ),
    click.option(
        "--memory-limit",
        callback=_bytes,
        metavar="SIZE",
        help="Stay below this, such as 8GB, where there is a choice of what to keep in memory, and refuse a refit that "
        "does not fit.  [default: what is free]",
    ),
    click.option("--seed", default=RuntimeConfig.seed, show_default=True, help="Seed of every random choice."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own messages."),
)
_CALIBRATION = _options(
    click.option(
        "--calibration",
        multiple=True,
        default=CalibrationConfig.sources,
        show_default=True,
        metavar="NAME|FILE[:WEIGHT]",
        help="Calibration data: bundled, a .txt .jsonl .json .csv .parquet file, or a hub data set "
        "(wikitext2, c4, gsm8k, OWNER/NAME[#CONFIG][@SPLIT]). Rows with prompt and answer, or chat messages, carry "
        "loss on the answer only. May be given several times to mix sources: --calibration task.jsonl:2 "
        "--calibration bundled:1 takes two thirds of the sequences from task.jsonl. A weight (default "
        f"{CalibrationConfig.DEFAULT_WEIGHT:g}) is a share of sequences, not of the tokens that carry loss; the notes "
        "printed on the way say how many of those each source has.",
    ),
    click.option(
        "--samples",
        default=CalibrationConfig.samples,
        show_default=True,
        help="Calibration sequences, from all sources together.",
    ),
    click.option(
        "--sequence-length",
        default=CalibrationConfig.sequence_length,
        show_default=True,
        help="Tokens in a sequence, in calibration and evaluation.",
    ),
    click.option("--text-column", metavar="NAME", help="Column that holds the text in a table file."),
    click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Keep the calibration statistics here, so that another target or budget needs no new pass over the data. "
        "They take about as much room as the model.",
    ),
)


@cli.command(cls=_WithNames, context_settings=CONTEXT)
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
    callback=_layer_list,
    metavar="I,J,...",
    help="The layers to operate on, counted from 0, instead of the scorer's choice.",
)
@_REMOVE
@click.option("--scorer", default=None, metavar="NAME", help="How layers are ranked (see below).")
@click.option("--method", default=None, metavar="NAME", help="How low-rank components are made (see below).")
@click.option(
    "--refit/--no-refit",
    default=None,
    help="Re-solve what stays, in closed form, so that the result follows the original.  [default: with --method "
    f"{DEFAULT_METHOD}]",
)
@click.option(
    "--refit-scope",
    default=RefitConfig.scope,
    show_default=True,
    metavar="all|operated",
    help="operated: low-rank layers only; the others stay as they are, bit for bit.",
)
@click.option(
    "--refit-general",
    default=RefitConfig.general,
    show_default=True,
    metavar="F",
    help="Share of general text (the bundled one) among the sequences that the refit looks at.",
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Apply this plan, or the plan in this surgery.json, instead of making one.",
)
@_CALIBRATION
@_EVALUATION
@click.option("--dry-run", is_flag=True, help="Do everything but the writing.")
@click.option("--overwrite", is_flag=True, help="Replace the output directory if it holds a model already.")
@_RUNTIME
def compress(model: str, no_eval: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Remove the least important layers of MODEL, put low-rank components in their place, and save the result."""
    from layer_surgery import api
    from layer_surgery.pipeline import report_dict
    from layer_surgery.reporting.console import print_report

    if no_eval:
        options["eval_data"] = None
    with _ui() as ui:
        report = api.compress(model, ui=ui, command=_command_line(), **_given(options))
    if as_json:
        _print_json(report_dict(report))
    else:
        print_report(Console(highlight=False, soft_wrap=True), report)
    _check_complete(report.failures)


@cli.command(cls=_WithNames, context_settings=CONTEXT)
@click.argument("model")
@click.option("--scorer", default=None, metavar="NAME", help="How layers are ranked (see below).")
@click.option(
    "--target-layers",
    type=int,
    metavar="N",
    help="Choose the layers for this target (greedy and block scorers need it).",
)
@_REMOVE
@_CALIBRATION
@_RUNTIME
def score(model: str, as_json: bool, debug: bool, **options: Any) -> None:
    """Rank the layers of MODEL by importance, the least important first."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_scores

    with _ui() as ui:
        scores = api.score(model, ui=ui, command=_command_line(), **_given(options))
    if as_json:
        _print_json(asdict(scores))
    else:
        print_scores(Console(highlight=False, soft_wrap=True), scores)


@cli.command(context_settings=CONTEXT)
@click.argument("model")
@click.option(
    "--baseline", metavar="OTHER", help="A second model to measure on the same tokens, for example the original."
)
@_EVALUATION
@click.option(
    "--sequence-length", default=EvaluationConfig.sequence_length, show_default=True, help="Tokens in a window."
)
@click.option("--text-column", metavar="NAME", help="Column that holds the text in a table file.")
@_RUNTIME
def evaluate(model: str, no_eval: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Measure MODEL, alone or beside a baseline: size, perplexity, distance, tasks, speed and memory."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_evaluation

    if no_eval:
        options["eval_data"] = None
    with _ui() as ui:
        report = api.evaluate(model, ui=ui, command=_command_line(), **_given(options))
    if as_json:
        _print_json(report.to_dict())
    else:
        print_evaluation(Console(highlight=False, soft_wrap=True), report, model)
    _check_complete(report.failures)


def _check_complete(failures: list[Any]) -> None:
    """Have the command fail, after all that was found has been printed, if an evaluation did."""
    from layer_surgery.errors import LayerSurgeryError

    if failures:
        raise LayerSurgeryError("; ".join(f"{failure.stage} failed: {failure.error}" for failure in failures))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Leave out options whose default lives in the configuration."""
    return {name: value for name, value in options.items() if value is not None or name == "eval_data"}


@contextmanager
def _ui() -> Iterator[Any]:
    """Progress bars and notes on stderr; bars only where stderr is a terminal."""
    from layer_surgery.session import Ui

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


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def _command_line() -> str:
    return shlex.join(["layer-surgery", *sys.argv[1:]])


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
    for name in ("transformers", "lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
