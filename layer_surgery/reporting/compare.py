"""Several results on one page: those of several compressions, or the points of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layer_surgery.records import (
    Comparison,
    EvaluationResult,
    Interval,
    KlDivergence,
    Perplexity,
    SurgeryPlan,
    SurgeryReport,
    TaskMetric,
)
from layer_surgery.records.sweep import SweepReport
from layer_surgery.reporting.derived import changed_layers, decoding_ratio, main_tasks
from layer_surgery.reporting.figures.tradeoff import Point, tradeoff
from layer_surgery.reporting.formats import number_list
from layer_surgery.reporting.provenance import Provenance, provenance_section
from layer_surgery.reporting.sentences import best_note, failed_points
from layer_surgery.reporting.templates import render


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One result, as far as the page needs it. What was not measured is left out."""

    name: str
    base: str
    """Name of the original."""
    base_sha256: str
    method: str
    scorer: str = ""
    refit: str
    layers: int
    """Of the original."""
    removed: list[int]
    low_rank: list[int]
    parameters: int
    parameters_before: int
    perplexity: dict[str, Perplexity]
    """After the surgery, by text."""
    ratio: dict[str, Interval]
    """Perplexity after over before, by text."""
    kl_divergence: dict[str, KlDivergence]
    tasks: dict[str, tuple[str, TaskMetric, Interval | None]]
    """The first metric of each group of tasks, or of each task where there is no group: its name, its value after, and
    the paired difference."""
    decoding: float | None
    """Decoding speed, after over before."""

    @property
    def kind(self) -> str:
        """The kind of surgery in few words: method, scorer, and whether there was a refit."""
        refit = " + refit" if self.refit not in ("", "none") else ""
        return f"{self.method}{refit}" + (f", {self.scorer}" if self.scorer else "")

    @property
    def share(self) -> float:
        """Parameters, per cent of the original's."""
        return 100 * self.parameters / self.parameters_before if self.parameters_before else 100.0


def result_row(name: str, report: SurgeryReport) -> ResultRow:
    """Return the row of a compression's report."""
    row = _row(name, report.base_model, report.plan, report.before, report.after, report.comparison)
    return replace(row, scorer=report.scores.scorer if report.scores else "")


def sweep_rows(report: SweepReport, prefix: str = "") -> Iterator[ResultRow]:
    """Yield a row for every point that was measured.

    Args:
        prefix: beginning of the rows' names, where there are several sweeps.
    """
    for point in report.points:
        if point.result is None or point.plan is None or point.status == "failed":
            continue
        name, comparison = f"{point.target_layers} whole, keep {point.keep:g}", point.comparison or Comparison()
        before = report.original or point.result
        row = _row(prefix + name, report.base_model, point.plan, before, point.result, comparison)
        yield replace(row, method=point.method, scorer=point.scorer, decoding=point.decode_speed)


def _row(
    name: str,
    base: dict[str, Any],
    plan: SurgeryPlan,
    before: EvaluationResult,
    after: EvaluationResult,
    comparison: Comparison,
) -> ResultRow:
    return ResultRow(
        name=name,
        base=str(base["name"]),
        base_sha256=str(base.get("sha256", "")),
        method=plan.method,
        refit=plan.refit,
        layers=len(plan.layers),
        removed=changed_layers(plan).removed,
        low_rank=[layer.index for layer in plan.low_rank],
        parameters=after.parameters,
        parameters_before=before.parameters,
        perplexity=after.perplexity,
        ratio={text: change.ratio for text, change in comparison.perplexity.items()},
        kl_divergence=comparison.kl_divergence,
        tasks={
            task: (metric, value, comparison.tasks.get(task, {}).get(metric))
            for task in main_tasks(after)
            for metric, value in list(after.tasks[task].metrics.items())[:1]
        },
        decoding=decoding_ratio(before, after),
    )


def comparison_page(rows: Sequence[ResultRow], notes: Sequence[str] = (), provenance: Provenance | None = None) -> str:
    """Return a page that compares results: quality against size, and the layers that were changed.

    Args:
        notes: sentences for its beginning.
        provenance: of all results, if one run made them.
    """
    texts = list(dict.fromkeys(text for row in rows for text in row.ratio))
    return render(
        "compare.html.jinja",
        title=f"{len(rows)} results of layer surgery",
        rows=list(enumerate(rows, start=1)),
        texts=texts,
        tasks=list(dict.fromkeys(task for row in rows for task in row.tasks)),
        notes=notes,
        provenance=provenance,
        warnings=list(warnings(rows)),
        plots=[
            tradeoff(
                f"quality-{place}",
                text,
                [
                    Point(number, row.share, row.ratio[text], row.kind)
                    for number, row in enumerate(rows, start=1)
                    if text in row.ratio
                ],
            )
            for place, text in enumerate(texts)
        ],
        decoding=any(row.decoding is not None for row in rows),
        numbers=number_list,
    )


def sweep_page(report: SweepReport) -> str:
    """Return the page of a sweep, which compares its points."""
    notes = [*best_note(report), *(f"Failed: {line}" for line in failed_points(report))]
    provenance = provenance_section(report.base_model, report.calibration, report.provenance, {})
    return comparison_page(list(sweep_rows(report)), notes, provenance)


def warnings(rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield why numbers of these rows should not be compared, if so."""
    if len({row.base_sha256 for row in rows}) > 1:
        yield "The results were not all made from the same original, so ratios are to different models."
    for text in dict.fromkeys(text for row in rows for text in row.perplexity):
        data = {row.perplexity[text].data_sha256 for row in rows if text in row.perplexity}
        if len(data) > 1:
            yield f"Perplexity on {text} was not measured on the same windows everywhere; do not compare it."
