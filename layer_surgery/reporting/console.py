"""Records as tables on the terminal."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from layer_surgery.records import (
    Comparison,
    Continuation,
    EvaluationReport,
    EvaluationResult,
    LayerScores,
    SpectrumRecord,
    SurgeryPlan,
    SurgeryReport,
)
from layer_surgery.records.sweep import SweepReport
from layer_surgery.reporting.derived import changed_layers, is_joint, kept_columns, kept_count, ranked
from layer_surgery.reporting.formats import with_interval
from layer_surgery.reporting.measurements import Row, measurement_tables, report_tables
from layer_surgery.reporting.sentences import best_sentence, budgets, failed_points, healing_sentence
from layer_surgery.reporting.sweep_table import TEXT_COLUMNS, legend, sweep_table

_BLOCKS = "▏▎▍▌▋▊▉█"


def print_report(console: Console, report: SurgeryReport) -> None:
    """Print what was done to which layers, and before against after."""
    plan = report.plan
    changes = zip(
        ("removed", "parts removed", "low-rank", "fewer channels or heads", "fewer experts", "MLPs bypassed"),
        changed_layers(plan),
        strict=True,
    )
    whole = f"[bold]{escape(report.base_model['name'])}[/]: {plan.target_layers} of {len(plan.layers)} layers whole"
    changed = [f"{change}: {', '.join(map(str, layers))}" for change, layers in changes if layers]
    console.print("; ".join([whole, *changed]), highlight=False)
    if plan.smaller:
        print_ranks(console, plan, report.spectra)
    titles, tables = report_tables(report)
    _print_tables(console, tables, [*titles, "change"])
    if healing := healing_sentence(report):
        console.print(escape(healing), highlight=False)
    for sentence in budgets(report):
        console.print(sentence, highlight=False)
    _print_prediction(console, report)
    _print_continuations(console, report.continuations, ("before", "after"))
    if report.output is None:
        console.print("nothing was written")
    else:
        console.print(f"saved to [bold]{escape(report.output)}[/] (report: surgery.json)")
        if not any(failure.stage == "report page" for failure in report.failures):
            console.print(f"page: [bold]{escape(report.output)}/report.html[/]")


def print_evaluation(console: Console, report: EvaluationReport, name: str) -> None:
    """Print what was measured of a model, alone or beside its baseline."""
    titles = (name, "", "") if report.baseline is None else ("baseline", "model", "change")
    _print_measurements(console, report.baseline, report.model, report.comparison, titles)
    _print_continuations(console, report.continuations, ("baseline", "model"))


def print_scores(console: Console, scores: LayerScores) -> None:
    """Print the layers ranked, the least important first, with a bar for each value."""
    table = Table(box=None, pad_edge=False, title=f"{scores.scorer}: {scores.quantity}", title_justify="left")
    for title in ("goes", "layer", "value"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    span = max((abs(value) for value in scores.values), default=0.0) or 1.0
    for row in ranked(scores):
        table.add_row(row.goes, str(row.layer), f"{row.value:.5g}", _bar(abs(row.value) / span))
    console.print(table)
    if is_joint(scores):
        console.print("values are of single layers; the order is of layers together")


def print_sweep(console: Console, report: SweepReport, directory: Path | None = None) -> None:
    """Print all points of a sweep, the fronts, which model was saved, and where, if the directory is given."""
    titles, rows = sweep_table(report)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(escape(title), justify="left" if title in TEXT_COLUMNS else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    needed = sum(max(map(len, column)) + 2 for column in zip(titles, *rows, strict=True))
    console.width = max(console.width, needed)  # a terminal that is too narrow breaks lines, but no number is cut
    console.print(table)
    if any(point.fronts for point in report.points):
        console.print(legend(report))
    for line in failed_points(report):
        console.print(escape(f"failed: {line}"))
    if report.best is not None and report.best.point is not None:
        console.print(escape(best_sentence(report.best, directory or Path())))
    if directory is None:
        return
    files = "report.html, sweep.json, sweep.csv, sweep.md"
    console.print(f"kept in [bold]{escape(str(directory))}[/] ({files})")


def print_ranks(console: Console, plan: SurgeryPlan, spectra: Sequence[SpectrumRecord] = ()) -> None:
    """Print what stays of the layers that are smaller: the rank of every linear, channels of the MLP and heads."""
    linears = kept_columns(plan)
    title = ", ".join(["ranks", *dict.fromkeys(name for layer in plan.smaller for name in layer.units)])
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for title in linears.values():
        table.add_column(title, justify="right", overflow="fold")
    for layer in plan.smaller:
        table.add_row(str(layer.index), *(kept_count(layer, name, spectra) or "-" for name in linears))
    console.print(table)


def _print_measurements(
    console: Console,
    before: EvaluationResult | None,
    after: EvaluationResult,
    comparison: Comparison | None,
    titles: tuple[str, str, str],
) -> None:
    results = [after] if before is None else [before, after]
    _print_tables(console, measurement_tables(results, comparison), titles if before is not None else titles[:1])


def _print_tables(console: Console, tables: list[tuple[str, list[Row]]], titles: Sequence[str]) -> None:
    """Print rows under the titles of the models and, of several, of the change."""
    cells = [
        [("  " if row.level == "part" else "") + row.label + (f"\n  ({row.note})" if row.note else ""), *row.values]
        + ([] if len(titles) == 1 else [row.change])
        for _, rows in tables
        for row in rows
    ]
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("", overflow="fold")
    for column, title in enumerate(titles, start=1):
        # Names may be folded on a narrow terminal; numbers must not be.
        width = max(len(line[column]) for line in cells)
        table.add_column(escape(title), justify="right", overflow="fold", min_width=width)
    for line in cells:
        table.add_row(*map(escape, line))
    console.print(table)


def _print_prediction(console: Console, report: SurgeryReport) -> None:
    """Print the predicted rise of the loss beside the measured one."""
    predicted, expected = report.plan.predicted_loss_rise, report.expected
    both = {name: value for name, value in report.before.perplexity.items() if name in report.after.perplexity}
    if (predicted is None and expected is None) or not both:
        return
    measured = ", ".join(
        f"{math.log(report.after.perplexity[name].value / before.value):+.3f} on {escape(name)}"
        for name, before in both.items()
    )
    if expected is not None:
        said = f"expected after the refit {with_interval(expected, '+.3f')} on text like the calibration data"
    else:
        said = f"predicted {predicted:+.3f} on the calibration data"
    console.print(f"loss (nats per token): {said}; measured {measured}", highlight=False)


def _print_continuations(console: Console, continuations: list[Continuation], titles: tuple[str, str]) -> None:
    """Print what the models wrote after each prompt, each text on one line."""
    for number, continuation in enumerate(continuations, start=1):
        table = Table(box=None, pad_edge=False, show_header=False, title_justify="left", padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(f"prompt {number}", Text(" ".join(continuation.prompt.split()), style="bold"))
        for title, text in zip(titles, (continuation.before, continuation.after), strict=True):
            if text is not None:
                table.add_row(title, Text(" ".join(text.split())))
        console.print(table)


def _bar(fraction: float, width: int = 24) -> str:
    full, part = divmod(round(fraction * width * 8), 8)
    return "█" * full + (_BLOCKS[part - 1] if part else "")
