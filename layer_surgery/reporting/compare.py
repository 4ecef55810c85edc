"""Several results side by side on one page. Works on simple rows, whatever they were read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from matplotlib.figure import Figure

from layer_surgery.records import (
    Comparison,
    EvaluationResult,
    Interval,
    KlDivergence,
    Perplexity,
    SurgeryReport,
    TaskMetric,
)
from layer_surgery.reporting.figures.svg import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, VERMILLION, Plot, draw
from layer_surgery.reporting.formats import number_list
from layer_surgery.reporting.made import Made
from layer_surgery.reporting.templates import render
from layer_surgery.reporting.text import plain_label

#: Colour and marker of each kind of result.
_STYLES = [(BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (MUTED, "P")]
#: In a plot with more results than this only those on the front are numbered.
_NUMBERED = 12


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One result, as far as the page needs it. What was not measured is left out."""

    name: str
    base: str
    """What the original is called."""
    base_sha256: str = ""
    method: str
    scorer: str = ""
    refit: str = ""
    layers: int
    """Of the original."""
    removed: list[int] = field(default_factory=list)
    low_rank: list[int] = field(default_factory=list)
    parameters: int
    parameters_before: int
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    """After the surgery, by text."""
    ratio: dict[str, Interval] = field(default_factory=dict)
    """Perplexity after over before, by text."""
    kl_divergence: dict[str, KlDivergence] = field(default_factory=dict)
    tasks: dict[str, tuple[str, TaskMetric, Interval | None]] = field(default_factory=dict)
    """The first metric of each group of tasks, or of each task where there is no group: its name, its value after, and
    the paired difference."""
    decoding: float | None = None
    """Decoding speed, after over before."""

    @property
    def kind(self) -> str:
        """What was done, in few words: the method, the scorer and whether there was a refit."""
        refit = " + refit" if self.refit not in ("", "none") else ""
        return f"{self.method}{refit}" + (f", {self.scorer}" if self.scorer else "")

    @property
    def share(self) -> float:
        """Parameters, per cent of the original's."""
        return 100 * self.parameters / self.parameters_before if self.parameters_before else 100.0


def result_row(name: str, report: SurgeryReport) -> ResultRow:
    """Return the row of a compression's report."""
    plan, before, after = report.plan, report.before, report.after
    decoding = None
    if before.speed and after.speed and before.speed[0].decode_tokens_per_second:
        decoding = after.speed[0].decode_tokens_per_second / before.speed[0].decode_tokens_per_second
    return ResultRow(
        name=name,
        base=str(report.base_model["name"]),
        base_sha256=str(report.base_model.get("sha256", "")),
        method=plan.method,
        scorer=report.scores.scorer if report.scores else "",
        refit=plan.refit,
        layers=len(plan.layers),
        removed=[layer.index for layer in plan.layers if layer.action == "remove"],
        low_rank=[layer.index for layer in plan.low_rank],
        parameters=after.parameters,
        parameters_before=before.parameters,
        perplexity=after.perplexity,
        ratio={text: change.ratio for text, change in report.comparison.perplexity.items()},
        kl_divergence=report.comparison.kl_divergence,
        tasks=first_metrics(after, report.comparison),
        decoding=decoding,
    )


def first_metrics(
    result: EvaluationResult, comparison: Comparison | None
) -> dict[str, tuple[str, TaskMetric, Interval | None]]:
    """Return what `ResultRow.tasks` holds."""
    tasks = {}
    groups = [name for name, task in result.tasks.items() if task.group]
    for name in groups or result.tasks:
        for metric, value in list(result.tasks[name].metrics.items())[:1]:
            change = comparison.tasks.get(name, {}).get(metric) if comparison is not None else None
            tasks[name] = (metric, value, change)
    return tasks


def comparison_page(rows: Sequence[ResultRow], notes: Sequence[str] = (), made: Made | None = None) -> str:
    """Return a page that compares results: quality against size, and what was done to which layers.

    Args:
        notes: sentences for its beginning.
        made: how they were made, if all were made by one run.
    """
    texts = list(dict.fromkeys(text for row in rows for text in row.ratio))
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    return render(
        "compare.html.jinja",
        title=f"{len(rows)} results of layer surgery",
        rows=list(enumerate(rows, start=1)),
        texts=texts,
        tasks=tasks,
        notes=notes,
        made=made,
        warnings=list(warnings(rows)),
        plots=[plot for text in texts for plot in _quality(rows, text, texts.index(text))],
        decoding=any(row.decoding is not None for row in rows),
        numbers=number_list,
    )


def warnings(rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield why numbers of these rows should not be compared, if so."""
    if len({row.base_sha256 for row in rows}) > 1:
        yield "The results were not all made from the same original, so ratios are to different models."
    for text in dict.fromkeys(text for row in rows for text in row.perplexity):
        data = {row.perplexity[text].data_sha256 for row in rows if text in row.perplexity}
        if len(data) > 1:
            yield f"Perplexity on {text} was not measured on the same windows everywhere; do not compare it."


def _quality(rows: Sequence[ResultRow], text: str, place: int) -> Iterator[Plot]:
    points = [(number, row, row.ratio[text]) for number, row in enumerate(rows, start=1) if text in row.ratio]
    best = _not_dominated([(row.share, ratio.value) for _, row, ratio in points])

    kinds = list(dict.fromkeys(row.kind for _, row, _ in points))
    crowded = len(points) > _NUMBERED

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        line = sorted((points[k][1].share, points[k][2].value) for k in best)
        axes.plot([x for x, _ in line], [y for _, y in line], color=MUTED, linewidth=1, linestyle="--")
        for k, (_, row, ratio) in enumerate(points):
            colour, marker = _STYLES[kinds.index(row.kind) % len(_STYLES)]
            axes.plot([row.share] * 2, [ratio.low, ratio.high], color=colour, linewidth=1.2)
            fill = "full" if k in best else "none"
            axes.plot(row.share, ratio.value, marker, color=colour, markersize=7, fillstyle=fill)
        named = [point for k, point in enumerate(points) if k in best] if crowded else points
        for (x, y), numbers in _at_one_place(named).items():
            axes.annotate(numbers, (x, y), xytext=(6, 5), textcoords="offset points", color=INK, fontsize=10)
        if len(kinds) > 1:
            for (colour, marker), kind in zip(cycle(_STYLES), kinds, strict=False):
                axes.plot([], [], marker, color=colour, label=plain_label(kind, 40))
            figure.legend(loc="outside upper left", ncols=2)
        axes.axhline(1, color=INK, linewidth=1)
        axes.set_xlabel("parameters, % of the original")
        axes.set_ylabel("perplexity, x the original's")
        if crowded:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.margins(0.12)

    words = "; ".join(f"{n}: {row.share:.1f} %, x {ratio.value:.3f}" for n, row, ratio in points)
    yield draw(
        f"quality-{place}",
        f"Perplexity against size, {text}",
        f"Scatter plot of perplexity relative to the original against parameters. {words}.",
        "The numbers are those of the table; lower and further left is better. Filled: no other result is both smaller "
        "and better. Lines are 95 % paired bootstrap intervals." + (" The scale is logarithmic." if crowded else ""),
        height=300 + 16 * ((len(kinds) + 1) // 2 if len(kinds) > 1 else 0),
        paint=paint,
    )


def _at_one_place(points: Sequence[tuple[int, ResultRow, Interval]]) -> dict[tuple[float, float], str]:
    """Return the numbers of the points at each place, so that equal results do not hide each other's."""
    places: dict[tuple[float, float], list[int]] = {}
    for number, row, ratio in points:
        places.setdefault((round(row.share, 1), round(ratio.value, 3)), []).append(number)
    return {place: ", ".join(map(str, numbers)) for place, numbers in places.items()}


def _not_dominated(points: Sequence[tuple[float, float]]) -> set[int]:
    """Return the indices of points that no other point undercuts in one coordinate without exceeding in the other."""
    return {k for k, (x, y) in enumerate(points) if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)}
