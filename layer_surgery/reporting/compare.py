"""Several results on one page: those of several compressions, or the points of a sweep."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layer_surgery.records import Comparison, EvaluationResult, Interval, SurgeryPlan, SurgeryReport, TaskMetric
from layer_surgery.records.sweep import SweepReport
from layer_surgery.reporting.derived import changed_layers, main_tasks, speed_change
from layer_surgery.reporting.figures.tradeoff import Point, tradeoff
from layer_surgery.reporting.formats import number_list
from layer_surgery.reporting.provenance import Provenance, provenance_section
from layer_surgery.reporting.sentences import best_note, failed_points
from layer_surgery.reporting.templates import render


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One result, as the page needs it. What was not measured is left out."""

    name: str
    base: dict[str, Any]  #: Record of the original.
    plan: SurgeryPlan
    method: str
    scorer: str
    before: EvaluationResult
    after: EvaluationResult
    comparison: Comparison
    decoding: float | None  #: Decoding speed, after over before.

    @property
    def kind(self) -> str:
        """The kind of surgery in few words: method, scorer, and whether there was a refit."""
        refit = " + refit" if self.plan.refit not in ("", "none") else ""
        return f"{self.method}{refit}" + (f", {self.scorer}" if self.scorer else "")

    @property
    def removed(self) -> list[int]:
        """Indices of the removed layers."""
        return changed_layers(self.plan).removed

    @property
    def share(self) -> float:
        """Parameters, per cent of the original's."""
        return 100 * self.after.parameters / self.before.parameters if self.before.parameters else 100.0

    @property
    def tasks(self) -> dict[str, tuple[TaskMetric, Interval | None]]:
        """The first metric of each group of tasks, or of each task if there is no group, and the paired difference."""
        return {
            task: (value, self.comparison.tasks.get(task, {}).get(metric))
            for task in main_tasks(self.after)
            for metric, value in list(self.after.tasks[task].metrics.items())[:1]
        }


def result_row(name: str, report: SurgeryReport) -> ResultRow:
    """Return the row of a compression's report."""
    speed = speed_change(report.before, report.after)
    return ResultRow(
        name=name,
        base=report.base_model,
        plan=report.plan,
        method=report.plan.method,
        scorer=report.scores.scorer if report.scores else "",
        before=report.before,
        after=report.after,
        comparison=report.comparison,
        decoding=speed.ratio if speed is not None and speed.word == "decoding" else None,
    )


def sweep_rows(report: SweepReport, prefix: str = "") -> Iterator[ResultRow]:
    """Yield a row for every point that was measured.

    Args:
        prefix: beginning of the rows' names, where there are several sweeps.
    """
    for point in report.points:
        if point.result is not None and point.plan is not None and point.status != "failed":
            yield ResultRow(
                name=f"{prefix}{point.target_layers} whole, keep {point.keep:g}",
                base=report.base_model,
                plan=point.plan,
                method=point.method,
                scorer=point.scorer,
                before=report.original or point.result,
                after=point.result,
                comparison=point.comparison or Comparison(),
                decoding=point.decode_speed,
            )


def comparison_page(rows: Sequence[ResultRow], notes: Sequence[str] = (), provenance: Provenance | None = None) -> str:
    """Return a page that compares results: quality against size, and the layers that were changed.

    Args:
        notes: sentences for its beginning.
        provenance: of all results, if one run made them.
    """
    texts = list(dict.fromkeys(text for row in rows for text in row.comparison.perplexity))
    return render(
        "compare.html.jinja",
        title=f"{len(rows)} results of layer surgery",
        rows=list(enumerate(rows, start=1)),
        texts=texts,
        tasks=list(dict.fromkeys(task for row in rows for task in row.tasks)),
        notes=notes,
        provenance=provenance,
        warnings=list(warnings(rows)),
        plots=[tradeoff(f"quality-{place}", text, _points(rows, text)) for place, text in enumerate(texts)],
        decoding=any(row.decoding is not None for row in rows),
        numbers=number_list,
    )


def _points(rows: Sequence[ResultRow], text: str) -> list[Point]:
    """Return the results of which perplexity on a text was compared with the original's."""
    changes = [row.comparison.perplexity.get(text) for row in rows]
    return [
        Point(number, row.share, change.ratio, row.kind)
        for number, (row, change) in enumerate(zip(rows, changes, strict=True), start=1)
        if change is not None
    ]


def sweep_page(report: SweepReport) -> str:
    """Return the page of a sweep, which compares its points."""
    notes = [*best_note(report), *(f"Failed: {line}" for line in failed_points(report))]
    provenance = provenance_section(report.base_model, report.calibration, report.provenance, {})
    return comparison_page(list(sweep_rows(report)), notes, provenance)


def warnings(rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield why numbers of these rows should not be compared, if so."""
    if len({row.base.get("sha256", "") for row in rows}) > 1:
        yield "The results were not all made from the same original, so ratios are to different models."
    measured = [row.after.perplexity for row in rows]
    for text in dict.fromkeys(text for found in measured for text in found):
        data = {found[text].data_sha256 for found in measured if text in found}
        if len(data) > 1:
            yield f"Perplexity on {text} was not measured on the same windows everywhere; do not compare it."
