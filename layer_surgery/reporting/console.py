"""Records as tables for people. Computes nothing new."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layer_surgery.records import EvaluationReport, LayerScores, SurgeryPlan, SurgeryReport
from layer_surgery.reporting.formats import short_names
from layer_surgery.reporting.measurements import print_continuations, print_measurements

_BLOCKS = "▏▎▍▌▋▊▉█"


def print_report(console: Console, report: SurgeryReport) -> None:
    """Print what was done to which layers, and before against after."""
    plan = report.plan
    removed = [layer.index for layer in plan.layers if layer.action == "remove"]
    without = [layer.index for layer in plan.low_rank if not any(layer.ranks.values())]
    low_rank = [layer.index for layer in plan.low_rank if layer.index not in without]
    console.print(
        f"[bold]{escape(report.base_model['name'])}[/]: {plan.target_layers} of {len(plan.layers)} layers whole; "
        + "; ".join(
            text
            for text in (
                f"removed: {_indices(removed)}" if removed else "",
                f"parts removed: {_indices(without)}" if without else "",
                f"low-rank: {_indices(low_rank)}" if low_rank else "",
            )
            if text
        ),
        highlight=False,
    )
    if plan.low_rank:
        print_ranks(console, plan)
    print_measurements(console, report.before, report.after, report.comparison, ("before", "after", "change"))
    print_prediction(console, report)
    print_continuations(console, report.continuations, ("before", "after"))
    if report.output is None:
        console.print("dry run: nothing was written", highlight=False)
    else:
        console.print(f"saved to [bold]{escape(report.output)}[/] (report: surgery.json)", highlight=False)
        if not any(failure.stage == "report page" for failure in report.failures):
            console.print(f"page: [bold]{escape(report.output)}/report.html[/]", highlight=False)


def print_prediction(console: Console, report: SurgeryReport) -> None:
    """Print the predicted rise of the loss beside the measured one."""
    predicted = report.plan.predicted_loss_rise
    if predicted is None or not report.before.perplexity:
        return
    measured = ", ".join(
        f"{math.log(report.after.perplexity[name].value / before.value):+.3f} on {escape(name)}"
        for name, before in report.before.perplexity.items()
    )
    refit = ", before the refit" if report.refit else ""
    console.print(
        f"loss (nats per token): predicted {predicted:+.3f} on the calibration data{refit}; measured {measured}",
        highlight=False,
    )


def print_evaluation(console: Console, report: EvaluationReport, name: str) -> None:
    """Print what was measured of a model, alone or beside its baseline."""
    titles = (name, "", "") if report.baseline is None else ("baseline", "model", "change")
    print_measurements(console, report.baseline, report.model, report.comparison, titles)
    print_continuations(console, report.continuations, ("baseline", "model"))


def print_ranks(console: Console, plan: SurgeryPlan) -> None:
    """Print the rank of every linear of the low-rank layers."""
    names = list(dict.fromkeys(name for layer in plan.low_rank for name in layer.ranks))
    table = Table(title="ranks", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for title in short_names(names):
        table.add_column(title, justify="right", overflow="fold")
    for layer in plan.low_rank:
        table.add_row(str(layer.index), *(str(layer.ranks.get(name, "-")) for name in names))
    console.print(table)


def print_scores(console: Console, scores: LayerScores) -> None:
    """Print the layers ranked, the least important first, with a bar for each value."""
    table = Table(box=None, pad_edge=False, title=f"{scores.scorer}: {scores.quantity}", title_justify="left")
    for title in ("goes", "layer", "value"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    span = max((abs(value) for value in scores.values), default=0.0) or 1.0
    rest = sorted(
        (i for i in range(len(scores.values)) if i not in scores.removal_order), key=lambda i: scores.values[i]
    )
    for place, index in enumerate([*scores.removal_order, *rest], start=1):
        value = scores.values[index]
        goes = str(place) if index in scores.removal_order else "stays"
        table.add_row(goes, str(index), f"{value:.5g}", _bar(abs(value) / span))
    console.print(table)
    order = [scores.values[index] for index in scores.removal_order]
    if order != sorted(order):
        console.print("values are of single layers; the order is of layers together", highlight=False)


def _bar(fraction: float, width: int = 24) -> str:
    eighths = round(fraction * width * 8)
    full, part = divmod(eighths, 8)
    return "█" * full + (_BLOCKS[part - 1] if part else "")


def _indices(indices: list[int]) -> str:
    return ", ".join(str(index) for index in indices)
