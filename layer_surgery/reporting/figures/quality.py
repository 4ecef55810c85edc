"""Figures about what was measured: the loss beside its prediction, tasks, and cost beside the original's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from layer_surgery.records import EvaluationResult, Interval, SurgeryReport
from layer_surgery.reporting.figures.svg import BLUE, CARD, GREEN, INK, MUTED, ORANGE, PURPLE, VERMILLION, Plot, draw
from layer_surgery.reporting.text import plain_label

#: Of a normal distribution, for intervals drawn from standard errors.
_NINETY_FIVE = 1.96


class _Bar(NamedTuple):
    label: str
    value: float
    low: float | None
    high: float | None
    colour: str
    hatch: str


def loss(report: SurgeryReport) -> Iterator[Plot]:
    """Yield the measured rise of the loss on each text, beside the predicted one where there is one."""
    bars = [
        _Bar(plain_label(f"measured: {name}"), d.value, d.low, d.high, VERMILLION, "")
        for name, change in report.comparison.perplexity.items()
        for d in [change.loss_difference]
    ]
    predicted = report.plan.predicted_loss_rise
    if predicted is not None:
        label = "predicted, before the refit" if report.refit else "predicted"
        bars.insert(0, _Bar(label, predicted, None, None, BLUE, "////"))
    if not bars:
        return
    note = "The prediction is for the calibration data"
    note += ", before the refit that then took a part of it back. " if report.refit else ". "
    yield draw(
        "loss",
        "Rise of the loss" + ("" if predicted is None else ": predicted and measured"),
        "Bars, in nats per token: " + "; ".join(f"{bar.label} {_value(bar, '+.4f')}" for bar in bars) + ".",
        ("" if predicted is None else note) + "Lines are 95 % paired bootstrap intervals over windows.",
        height=62 + 34 * len(bars),
        paint=lambda figure: _bars(figure, bars, "nats per token"),
    )


def _value(bar: _Bar, form: str) -> str:
    interval = "" if bar.low is None or bar.high is None else f" [{bar.low:{form}}, {bar.high:{form}}]"
    return f"{bar.value:{form}}{interval}"


def _bars(figure: Figure, bars: list[_Bar], unit: str) -> None:
    axes = figure.subplots()
    for place, bar in enumerate(bars):
        axes.barh(
            place, bar.value, height=0.62, color=bar.colour, hatch=bar.hatch, edgecolor=CARD, linewidth=0, alpha=0.85
        )
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color=INK, linewidth=1.6)
            axes.plot([bar.low, bar.high], [place, place], "|", color=INK, markersize=8)
    _names(axes, [bar.label for bar in bars])
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_xlabel(unit)
    axes.margins(x=0.08)


def _names(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def tasks(report: SurgeryReport) -> Iterator[Plot]:
    """Yield the score of each task before and after, and the paired difference."""
    chosen = {name: next(iter(task.metrics)) for name, task in report.after.tasks.items() if task.metrics}
    chosen = {
        name: metric
        for name, metric in chosen.items()
        if name in report.before.tasks and metric in report.before.tasks[name].metrics
    }
    if not chosen:
        return
    labels = {name: plain_label(f"{name}, {metric.partition(',')[0]}", 30) for name, metric in chosen.items()}
    yield _task_scores(report, chosen, labels)
    differences = {
        name: report.comparison.tasks[name][metric]
        for name, metric in chosen.items()
        if metric in report.comparison.tasks.get(name, {})
    }
    if differences:
        yield _task_differences(differences, labels)


def _task_scores(report: SurgeryReport, chosen: dict[str, str], labels: dict[str, str]) -> Plot:
    models = [(report.before, BLUE, "o", "before", -0.16), (report.after, VERMILLION, "s", "after", 0.16)]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for result, colour, marker, _, shift in models:
            for place, (name, metric) in enumerate(chosen.items()):
                found = result.tasks[name].metrics[metric]
                reach = _NINETY_FIVE * (found.stderr or 0.0)
                axes.errorbar(found.value, place + shift, xerr=reach, fmt=marker, color=colour, markersize=6, capsize=3)
        _names(axes, list(labels.values()))
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=label)
            for _, colour, marker, label, _ in models
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=2, handletextpad=0.2)

    text = "; ".join(
        f"{labels[name]}: {report.before.tasks[name].metrics[metric].value:.3f} before, "
        f"{report.after.tasks[name].metrics[metric].value:.3f} after"
        for name, metric in chosen.items()
    )
    return draw(
        "tasks",
        "Tasks, before and after",
        f"Points with error bars. {text}.",
        "Circles are the original, squares the result; lines are 95 % intervals of each by itself.",
        height=70 + 34 * len(chosen),
        paint=paint,
    )


def _task_differences(differences: dict[str, Interval], labels: dict[str, str]) -> Plot:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, interval in enumerate(differences.values()):
            axes.plot([interval.low, interval.high], [place, place], color=VERMILLION, linewidth=2)
            axes.plot([interval.low, interval.high], [place, place], "|", color=VERMILLION, markersize=8)
            axes.plot(interval.value, place, "s", color=VERMILLION, markersize=6)
        _names(axes, [labels[name] for name in differences])
        axes.axvline(0, color=INK, linewidth=1.2)
        axes.set_xlabel("after minus before")
        axes.margins(x=0.08)

    text = "; ".join(
        f"{labels[name]}: {interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
        for name, interval in differences.items()
    )
    return draw(
        "task-differences",
        "Tasks, paired difference",
        f"Points with intervals. {text}.",
        "Both models answered the same items, so the difference is known better than the scores; lines are 95 % paired "
        "bootstrap intervals. A line that crosses zero is no proof of a change.",
        height=70 + 34 * len(differences),
        paint=paint,
    )


def costs(before: EvaluationResult, after: EvaluationResult) -> Plot:
    """Return size and cost, and speed where it was measured, as a percentage of the original's."""
    bars = [
        _Bar(label, 100 * new / old, None, None, BLUE, "")
        for label, old, new in (
            ("parameters", before.parameters, after.parameters),
            ("bytes on disk", before.size_bytes, after.size_bytes),
            ("KV cache", before.kv_cache_bytes_per_token, after.kv_cache_bytes_per_token),
            ("operations a token", before.flops_per_token, after.flops_per_token),
        )
        if old and new is not None
    ]
    for old_point, new_point in zip(before.speed, after.speed, strict=False):
        where = f"{new_point.batch_size} x {new_point.prompt_tokens}"
        for label, attribute, colour, hatch in (
            ("peak memory", "peak_memory_bytes", ORANGE, ""),
            ("prefill speed", "prefill_tokens_per_second", GREEN, "////"),
            ("decoding speed", "decode_tokens_per_second", PURPLE, "xxxx"),
        ):
            old_value = getattr(old_point, attribute)
            if old_value:
                quotient = 100 * getattr(new_point, attribute) / old_value
                bars.append(_Bar(f"{label}, {where}", quotient, None, None, colour, hatch))

    def paint(figure: Figure) -> None:
        _bars(figure, bars, "% of the original")
        axes = figure.axes[0]
        axes.axvline(100, color=INK, linewidth=1.2, linestyle="--")
        end = 1.24 * max(100.0, *(bar.value for bar in bars))
        for place, bar in enumerate(bars):
            axes.text(end, place, f"{bar.value:.1f} %", va="center", ha="right", fontsize=10)
        axes.set_xlim(0, end)

    speed = " Speed is hatched, and more of it is better; for the rest less is better." if before.speed else ""
    return draw(
        "costs",
        "Cost, as a share of the original's",
        "Bars, per cent of the original: " + "; ".join(f"{bar.label} {bar.value:.1f}" for bar in bars) + ".",
        "The dashed line is the original." + speed,
        height=62 + 26 * len(bars),
        paint=paint,
    )
