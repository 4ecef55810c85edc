"""The command `sweep`: arguments to keyword arguments to `layer_surgery.api`, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

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
from layer_surgery.cli.evaluation_options import MEASUREMENTS
from layer_surgery.cli.options import CALIBRATION, REFIT, REMOVE, RUNTIME
from layer_surgery.config import BudgetConfig


@click.command(cls=WithNames, context_settings=CONTEXT)
@click.argument("model")
@click.option(
    "--target-layers",
    multiple=True,
    required=True,
    callback=comma_list(int, "numbers of layers", "11,10,9"),
    metavar="N,...",
    help="Numbers of layers left whole.",
)
@click.option(
    "--keep",
    multiple=True,
    callback=comma_list(float, "fractions", "0,0.1,0.3"),
    metavar="F,...",
    help="Fractions of the other layers' parameters to spend on low-rank components; 0 removes the layers outright. "
    f"Methods that keep nothing have one point for all of them.  [default: {BudgetConfig.DEFAULT_KEEP}]",
)
@click.option(
    "--method",
    multiple=True,
    callback=comma_list(str),
    metavar="NAME,...",
    help="How low-rank components are made (see below).",
)
@click.option(
    "--scorer", multiple=True, callback=comma_list(str), metavar="NAME,...", help="How layers are ranked (see below)."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Directory for sweep.json, sweep.csv, sweep.md and the page report.html. A sweep that was stopped goes on "
    "where it was, and one of the same model, data and settings grows by the points that it has not.",
)
@click.option(
    "--best",
    metavar="CONDITION",
    help="Save the smallest model that satisfies this in DIR/best: 'perplexity<=1.1x' (times the original's), "
    "'perplexity<=20', 'kl_divergence<=0.05' or 'top1_agreement>=0.9'; of several texts the mean counts.",
)
@REFIT
@REMOVE
@CALIBRATION
@MEASUREMENTS
@click.option("--overwrite", is_flag=True, help="Start anew if the directory holds a sweep already.")
@RUNTIME
def sweep(model: str, no_eval: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Compress MODEL in many ways, measure each, and find the points that no other beats. No model is written but the
    --best.

    Each point is what `compress` gives with the same options; what the points have in common is computed once. Quality
    is perplexity divided by the original's, with several texts the geometric mean.
    """
    from layer_surgery import api
    from layer_surgery.errors import LayerSurgeryError
    from layer_surgery.reporting.console import print_sweep
    from layer_surgery.reporting.sentences import best_sentence

    if no_eval:
        options["eval_data"] = None
    with progress_ui() as ui:
        report = api.sweep(model, ui=ui, command=command_line(), **given(options))
    if as_json:
        print_json(report.to_dict())
    else:
        print_sweep(Console(highlight=False, soft_wrap=True), report, options["output"])
    check_complete(report.failures)
    failed = sum(point.status == "failed" for point in report.points)
    if failed:
        raise LayerSurgeryError(f"{failed} of {len(report.points)} points failed; the same command tries them again.")
    if options["best"] is not None and report.best is not None and report.best.point is None:
        raise LayerSurgeryError(best_sentence(report.best))
