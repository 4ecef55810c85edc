"""Figures about measurements: the loss beside its prediction, tasks, and cost beside the original's."""

from collections.abc import Iterator
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from layer_surgery.records import EvaluationResult, Interval, SurgeryReport
from layer_surgery.reporting.derived import loss_unit
from layer_surgery.reporting.figures.svg import BLUE, CARD, GREEN, INK, MUTED, ORANGE, PURPLE, VERMILLION, Plot, draw
from layer_surgery.reporting.formats import with_interval
from layer_surgery.reporting.text import plain_label

#: Of a normal distribution, for intervals drawn from standard errors.
_NINETY_FIVE = 1.96


class _Bar(NamedTuple):
    label: str
    value: float
    colour: str
    hatch: str = ""
    interval: Interval | None = None


def loss(report: SurgeryReport) -> Iterator[Plot]:
    """Yield the measured rise of the loss on each text, beside the predicted one where there is one."""
    rises = {name: change.loss_difference for name, change in report.comparison.perplexity.items()}
    bars = [
        _Bar(plain_label(f"measured: {name}"), rise.value, VERMILLION, interval=rise) for name, rise in rises.items()
    ]
    predicted, expected = report.plan.predicted_loss_rise, report.expected
    if expected is not None:
        bars.insert(0, _Bar("expected after the refit", expected.value, BLUE, "\\\\", interval=expected))
    if predicted is not None:
        label = "predicted, before the refit" if report.refit else "predicted"
        bars.insert(0, _Bar(label, predicted, BLUE, "////"))
    if not bars:
        return
    unit = loss_unit(report)
    values = [f"{b.value:+.4f}" if b.interval is None else with_interval(b.interval, "+.4f") for b in bars]
    note = "The prediction is for the calibration data"
    note += ", before the refit that then took a part of it back. " if report.refit else ". "
    if expected is not None:
        note += "What is expected after it is for text like the calibration data. "
    yield draw(
        "loss",
        "Rise of the loss" + ("" if predicted is None else ": predicted and measured"),
        f"Bars, in {unit}: {_listed([bar.label for bar in bars], values, ' ')}.",
        ("" if predicted is None else note) + "Lines are 95 % paired bootstrap intervals over windows.",
        height=62 + 34 * len(bars),
        paint=lambda figure: _bars(figure, bars, unit),
    )


def tasks(report: SurgeryReport) -> Iterator[Plot]:
    """Yield the score of each task before and after, and the paired difference."""
    before = report.before.tasks
    first = {name: next(iter(task.metrics)) for name, task in report.after.tasks.items() if task.metrics}
    chosen = {name: metric for name, metric in first.items() if name in before and metric in before[name].metrics}
    if not chosen:
        return
    labels = {name: plain_label(f"{name}, {metric.partition(',')[0]}", 30) for name, metric in chosen.items()}
    yield _task_scores(report, chosen, list(labels.values()))
    differences = {
        labels[name]: report.comparison.tasks[name][metric]
        for name, metric in chosen.items()
        if metric in report.comparison.tasks.get(name, {})
    }
    if differences:
        yield _task_differences(differences)


def _task_scores(report: SurgeryReport, chosen: dict[str, str], labels: list[str]) -> Plot:
    """Return the scores with error bars; `chosen` has the metric of each task."""
    models = [(report.before, BLUE, "o", "before", -0.16), (report.after, VERMILLION, "s", "after", 0.16)]
    scores = [[result.tasks[name].metrics[metric] for name, metric in chosen.items()] for result, *_ in models]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for (_, colour, marker, _, shift), found in zip(models, scores, strict=True):
            for place, score in enumerate(found):
                reach = _NINETY_FIVE * (score.stderr or 0.0)
                axes.errorbar(score.value, place + shift, xerr=reach, fmt=marker, color=colour, markersize=6, capsize=3)
        _names(axes, labels)
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=label)
            for _, colour, marker, label, _ in models
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=2, handletextpad=0.2)

    values = [f"{old.value:.3f} before, {new.value:.3f} after" for old, new in zip(*scores, strict=True)]
    return draw(
        "tasks",
        "Tasks, before and after",
        f"Points with error bars. {_listed(labels, values)}.",
        "Circles are the original, squares the result; lines are 95 % intervals of each by itself.",
        height=70 + 34 * len(chosen),
        paint=paint,
    )


def _task_differences(differences: dict[str, Interval]) -> Plot:
    """Return the paired differences with their intervals, by label."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, interval in enumerate(differences.values()):
            _draw_interval(axes, place, interval, VERMILLION, 2)
            axes.plot(interval.value, place, "s", color=VERMILLION, markersize=6)
        _names(axes, list(differences))
        axes.axvline(0, color=INK, linewidth=1.2)
        axes.set_xlabel("after minus before")
        axes.margins(x=0.08)

    values = [with_interval(interval, "+.3f") for interval in differences.values()]
    return draw(
        "task-differences",
        "Tasks, paired difference",
        f"Points with intervals. {_listed(list(differences), values)}.",
        "Both models answered the same items, so the difference is known better than the scores; lines are 95 % paired "
        "bootstrap intervals. A line that crosses zero is no proof of a change.",
        height=70 + 34 * len(differences),
        paint=paint,
    )


def costs(before: EvaluationResult, after: EvaluationResult) -> Plot:
    """Return size and cost, and speed where it was measured, as a percentage of the original's."""
    bars = [
        _Bar(label, 100 * new / old, BLUE)
        for label, old, new in (
            ("parameters", before.parameters, after.parameters),
            ("bytes of the tensors", before.size_bytes, after.size_bytes),
            ("KV cache", before.kv_cache_bytes_per_token, after.kv_cache_bytes_per_token),
            ("operations a token", before.flops_per_token, after.flops_per_token),
        )
        if old and new is not None
    ]
    for old_point, new_point in zip(before.speed, after.speed, strict=False):
        where = f"{new_point.batch_size} x {new_point.prompt_tokens}"
        for label, attribute, colour, hatch in (
            ("peak memory", "peak_memory_bytes", ORANGE, ""),
            ("prefill speed" if new_point.new_tokens else "speed", "prefill_tokens_per_second", GREEN, "////"),
            ("decoding speed", "decode_tokens_per_second", PURPLE, "xxxx"),
        ):
            if old_value := getattr(old_point, attribute):
                quotient = 100 * getattr(new_point, attribute) / old_value
                bars.append(_Bar(f"{label}, {where}", quotient, colour, hatch))

    def paint(figure: Figure) -> None:
        _bars(figure, bars, "% of the original")
        axes = figure.axes[0]
        axes.axvline(100, color=INK, linewidth=1.2, linestyle="--")
        end = 1.24 * max(100.0, *(bar.value for bar in bars))
        for place, bar in enumerate(bars):
            axes.text(end, place, f"{bar.value:.1f} %", va="center", ha="right", fontsize=10)
        axes.set_xlim(0, end)

    speed = " Speed is hatched, and more of it is better; for the rest less is better." if before.speed else ""
    values = _listed([bar.label for bar in bars], [f"{bar.value:.1f}" for bar in bars], " ")
    return draw(
        "costs",
        "Cost, as a share of the original's",
        f"Bars, per cent of the original: {values}.",
        "The dashed line is the original." + speed,
        height=62 + 26 * len(bars),
        paint=paint,
    )


def _listed(labels: list[str], values: list[str], between: str = ": ") -> str:
    return "; ".join(f"{label}{between}{value}" for label, value in zip(labels, values, strict=True))


def _bars(figure: Figure, bars: list[_Bar], unit: str) -> None:
    axes = figure.subplots()
    for place, bar in enumerate(bars):
        axes.barh(
            place, bar.value, height=0.62, color=bar.colour, hatch=bar.hatch, edgecolor=CARD, linewidth=0, alpha=0.85
        )
        if bar.interval is not None:
            _draw_interval(axes, place, bar.interval, INK, 1.6)
    _names(axes, [bar.label for bar in bars])
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_xlabel(unit)
    axes.margins(x=0.08)


def _draw_interval(axes: Axes, place: float, interval: Interval, colour: str, width: float) -> None:
    axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=width)
    axes.plot([interval.low, interval.high], [place, place], "|", color=colour, markersize=8)


def _names(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
