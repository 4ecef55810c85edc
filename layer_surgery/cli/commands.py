"""The commands: options to keyword arguments of `layer_surgery.api`, and what is printed. No mathematics."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from layer_surgery.cli.common import CONTEXT, call, check_complete, command_on_model, print_json
from layer_surgery.cli.options import AS_JSON, DEBUG, options_of
from layer_surgery.config import CompressConfig, EvaluateConfig, ExportConfig, ScoreConfig, SweepConfig
from layer_surgery.errors import LayerSurgeryError, UserError


@command_on_model(CompressConfig)
def compress(model: str, as_json: bool, **options: Any) -> None:
    """Remove the least important layers of MODEL, put low-rank components in their place, and save the result."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_report
    from layer_surgery.runs.provenance import report_dict

    report = call(api.compress, model, options)
    if as_json:
        print_json(report_dict(report))
    else:
        print_report(_console(), report)
    check_complete(report.failures)


@command_on_model(ScoreConfig)
def score(model: str, as_json: bool, **options: Any) -> None:
    """Rank the layers of MODEL by importance, the least important first."""
    from layer_surgery import api
    from layer_surgery.reporting.console import print_scores

    scores = call(api.score, model, options)
    if as_json:
        print_json(asdict(scores))
    else:
        print_scores(_console(), scores)


@command_on_model(EvaluateConfig)
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


@command_on_model(SweepConfig, required=("target_layers", "output"))
def sweep(model: str, as_json: bool, **options: Any) -> None:
    """Compress MODEL in many ways, measure each, and find the points that no other beats. No model is written but the
    --best.

    Each point is what `compress` gives with the same options; what the points have in common is computed once. Quality
    is perplexity divided by the original's, with several texts the geometric mean.
    """
    from layer_surgery import api
    from layer_surgery.reporting.console import print_sweep
    from layer_surgery.reporting.sentences import best_sentence

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


@click.command(context_settings=CONTEXT)
@click.argument("directory", metavar="DIR")
@click.option(
    "--dense",
    is_flag=True,
    help="Multiply the factors of low-rank layers out: a plain checkpoint of the base architecture, which every tool "
    "loads without code from the directory. It computes the same and is as large as before the surgery, but for "
    "layers that were removed whole.",
)
@options_of(ExportConfig)
@AS_JSON
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
    click.echo(f"saved to {record.output}: {record.model_type}, {record.layers} layers, loads without code of its own")


@click.command(context_settings=CONTEXT)
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of the page; needed for several results.  [default: report.html in DIR]",
)
@click.option("--base-model", metavar="OWNER/NAME", help="Name of the original on the hub, for the model card.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists, or a model card that was edited.")
@DEBUG
def report(results: tuple[Path, ...], **options: Any) -> None:
    """Make the page of a result or a sweep again, or one page that compares several.

    With one result, report.html and the model card README.md in it are made again from its surgery.json; a card that
    was edited stays. Of a sweep, every point is compared.
    """
    from layer_surgery import api, parallel

    if not parallel.is_first():
        return
    page, notes = api.report(*results, **options)
    for note in notes:
        click.echo(note, err=True)
    click.echo(f"page: {page}")


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
