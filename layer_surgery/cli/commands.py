"""The commands: options to keyword arguments of `layer_surgery.api`, and what is printed. No mathematics."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from layer_surgery.cli import stopping
from layer_surgery.cli.common import CONTEXT, call, check_complete, command_on_model
from layer_surgery.cli.completion import Completed, completion_script
from layer_surgery.cli.help import GroupedCommand
from layer_surgery.cli.options import AS_JSON, DEBUG, QUIET, option, options_of
from layer_surgery.cli.terminal import HarmlessConsole, print_json
from layer_surgery.config import (
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    HealConfig,
    ScoreConfig,
    SweepConfig,
    VerifyConfig,
)
from layer_surgery.errors import LayerSurgeryError, UserError
from layer_surgery.reporting.text import one_line

if TYPE_CHECKING:
    from layer_surgery.records.foresight import Foresight


DRY_RUN = option(
    "--dry-run",
    "foresee",
    is_flag=True,
    group="Output",
    help="Say what memory, disk and time it would take, stage by stage, from a short probe of this machine; refuse "
    "what cannot fit. Nothing else is run, and nothing is written.",
)


@command_on_model(
    CompressConfig,
    examples={
        "Spend 80 % of the parameters where they are worth most, over all layers": (
            "compress MODEL --target-parameters 0.8 --output smaller"
        ),
        "Leave nine layers whole, those that a task needs most, and measure before and after": (
            "compress MODEL --target-layers 9 --calibration task.jsonl --tasks bundled --output smaller"
        ),
    },
)
@DRY_RUN
def compress(model: str, as_json: bool, foresee: bool, **options: Any) -> None:
    """Remove the least important layers of MODEL, put low-rank components in their place, and save the result."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_report
    from layer_surgery.runs.provenance import report_dict

    if foresee:
        _say_foreseen(call(api.foresee, model, options), as_json)
        return
    report = call(api.compress, model, options)
    if as_json:
        print_json(report_dict(report))
    else:
        print_report(_console(), report)
    check_complete(report.failures)


@command_on_model(
    HealConfig,
    metavar="RESULT",
    examples={
        "Train a result for ten minutes to follow the model that it was made of": (
            "heal smaller --data text.txt --output healed"
        ),
        "Train it on answers only, by two losses, on a fixed number of tokens": (
            "heal smaller --data task.jsonl --loss kl:1 --loss ce:0.2 --tokens 1000000 --output healed"
        ),
    },
)
@DRY_RUN
def heal(model: str, as_json: bool, foresee: bool, **options: Any) -> None:
    """Train RESULT, a directory that compress has written, to follow the model that it was made of, and save it."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_report
    from layer_surgery.runs.provenance import report_dict

    if foresee:
        _say_foreseen(call(api.foresee_heal, model, options), as_json)
        return
    report = call(api.heal, model, options)
    if as_json:
        print_json(report_dict(report))
    else:
        print_report(_console(), report)
    check_complete(report.failures)


@command_on_model(
    ScoreConfig,
    examples={
        "Rank the layers by what their removal would cost": "score MODEL",
        "Find the layers that a greedy search by perplexity would remove": (
            "score MODEL --scorer perplexity --target-layers 9"
        ),
    },
)
def score(model: str, as_json: bool, **options: Any) -> None:
    """Rank the layers of MODEL by importance, the least important first."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_scores

    scores = call(api.score, model, options)
    if as_json:
        print_json(asdict(scores))
    else:
        print_scores(_console(), scores)


@command_on_model(
    EvaluateConfig,
    examples={
        "Measure a model on a text and on the tasks that need no network": (
            "evaluate MODEL --eval-data held-out.txt --tasks bundled"
        ),
        "Compare a result with its original, with speed": "evaluate smaller --baseline MODEL --speed",
    },
)
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Measure MODEL, alone or beside a baseline: size, perplexity, distance, tasks, speed and memory."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_evaluation

    report = call(api.evaluate, model, options)
    if as_json:
        print_json(report.to_dict())
    else:
        print_evaluation(_console(), report, model)
    check_complete(report.failures)


@command_on_model(
    SweepConfig,
    required=("target_layers", "output"),
    examples={
        "Measure four compressions": "sweep MODEL --target-layers 10,9 --keep 0.1,0.3 --output sweep",
        "Save the smallest model whose perplexity is at most a tenth above the original's": (
            "sweep MODEL --target-layers 11,10,9 --output sweep --best 'perplexity<=1.1x'"
        ),
    },
)
@DRY_RUN
def sweep(model: str, as_json: bool, foresee: bool, **options: Any) -> None:
    """Compress MODEL in many ways, measure each, and find the points that no other beats. No model is written but the
    --best.

    Each point is what `compress` gives with the same options; what the points have in common is computed once. Quality
    is perplexity divided by the original's, with several texts the geometric mean.
    """
    from layer_surgery import api
    from layer_surgery.reporting.console import print_sweep
    from layer_surgery.reporting.sentences import best_sentence

    if foresee:
        _say_foreseen(call(api.foresee_sweep, model, options), as_json)
        return
    report = call(api.sweep, model, options)
    if as_json:
        print_json(report.to_dict())
    else:
        print_sweep(_console(), report, options["output"])
    check_complete(report.failures)
    failed = sum(point.status == "failed" for point in report.points)
    if failed:
        raise LayerSurgeryError(f"{failed} of {len(report.points)} points failed; the same command tries them again.")
    if options["best"] is not None and report.best is not None and report.best.point is None:
        raise LayerSurgeryError(best_sentence(report.best))


@click.command(
    cls=GroupedCommand,
    context_settings=CONTEXT,
    examples={
        "Write a result as a plain checkpoint": "export smaller --dense --output plain",
        "The same again, in the place of the old one": "export smaller --dense --output plain --overwrite",
    },
)
@click.argument("directory", metavar="DIR", type=Completed(paths="dir"))
@option(
    "--dense",
    is_flag=True,
    group="Output",
    help="Multiply the factors of low-rank layers out: a plain checkpoint of the base architecture, which every tool "
    "loads without code from the directory. It computes the same and is as large as before the surgery, but for "
    "layers that were removed whole.",
)
@options_of(ExportConfig)
@AS_JSON
@QUIET
@DEBUG
def export(directory: str, dense: bool, as_json: bool, **options: Any) -> None:
    """Write the result in DIR in another form; so far there is --dense."""
    from layer_surgery import api, parallel

    if not dense:
        raise UserError("say what to export: --dense (factors multiplied out) is the one form that there is.")
    if not parallel.is_first():
        return
    record = call(api.export_dense, directory, options)
    if as_json:
        print_json(asdict(record))
        return
    removed = f", {record.removed_linears} of them zero (removed)" if record.removed_linears else ""
    padded = f", {record.padded_linears} narrowed ones filled up with zeros" if record.padded_linears else ""
    click.echo(f"{record.linears} low-rank linears multiplied out{removed}{padded}")
    click.echo(
        f"{record.parameters_before:,} -> {record.parameters:,} parameters, {record.size_bytes_before:,} -> "
        f"{record.size_bytes:,} bytes ({record.dtype})"
    )
    saved = f"saved to {record.output}: {record.model_type}, {record.layers} layers, loads without code of its own"
    click.echo(one_line(saved))


@click.command(
    cls=GroupedCommand,
    context_settings=CONTEXT,
    examples={
        "Make page and model card of a result again": "report smaller --base-model OWNER/NAME",
        "Compare several results on one page": "report smaller smallest --output compared.html",
    },
)
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@option(
    "--output",
    group="Output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of the page; needed for several results.  [default: report.html in DIR]",
)
@option(
    "--base-model", group="Output", metavar="OWNER/NAME", help="Name of the original on the hub, for the model card."
)
@option("--overwrite", group="Output", is_flag=True, help="Replace FILE if it exists, or a model card that was edited.")
@DEBUG
def report(results: tuple[Path, ...], **options: Any) -> None:
    """Make the page of a result or a sweep again, or one page that compares several.

    With one result, report.html and the model card README.md in it are made again from its surgery.json; a card that
    was edited stays. Of a sweep, every point is compared.
    """
    from layer_surgery import api, parallel

    if not parallel.is_first():
        return
    stopping.stop_by_cleaning_up()
    page, notes = api.report(*results, **options)
    for note in notes:
        click.echo(one_line(note), err=True)
    click.echo(one_line(f"page: {page}"))


@click.command(
    cls=GroupedCommand,
    context_settings=CONTEXT,
    examples={
        "Look whether a result is what was written": "verify smaller",
        "Against its original, which has been moved": "verify smaller --base moved/model",
    },
)
@click.argument("directory", metavar="DIR", type=Completed(paths="dir"))
@options_of(VerifyConfig)
@AS_JSON
@QUIET
@DEBUG
def verify(directory: str, as_json: bool, **options: Any) -> None:
    """Compare every file of the result in DIR with its hash, and its original with the one that it was made from.

    Tells a damaged result, or a stale one (of an original that has changed), from a good one. Nothing is loaded or run.
    """
    from layer_surgery import api

    found = call(api.verify, directory, options)
    if as_json:
        print_json(found.to_dict())
    else:
        click.echo(f"{found.files} files, {found.bytes:,} bytes compared")
        for name in found.unlisted:
            click.echo(one_line(f"not of the result: {name}"))
        click.echo(one_line(f"original: {found.base}" + (f" ({found.base_name})" if found.base_name else "")))
    if found.problems:
        raise LayerSurgeryError(f"{found.directory} is not good: {'; '.join(found.problems)}.")


@click.command(
    cls=GroupedCommand,
    context_settings=CONTEXT,
    examples={
        "For bash, with the package bash-completion": (
            "completion bash > ~/.local/share/bash-completion/completions/layer-surgery"
        ),
        "For fish": "completion fish > ~/.config/fish/completions/layer-surgery.fish",
    },
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="SHELL")
@DEBUG
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script with which SHELL (bash, zsh or fish) completes commands, options and their values."""
    click.echo(completion_script(context.find_root(), shell))


def _console() -> Console:
    return HarmlessConsole(highlight=False, soft_wrap=True)


def _say_foreseen(found: "Foresight", as_json: bool) -> None:
    from layer_surgery.reporting.foresight_table import print_foresight

    if as_json:
        print_json(found.to_dict())
    else:
        print_foresight(_console(), found)
