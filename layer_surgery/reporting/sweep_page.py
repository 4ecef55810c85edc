"""The page of a sweep: its points as rows of a page that compares results."""

from __future__ import annotations

from collections.abc import Iterator

from layer_surgery.records import EvaluationResult
from layer_surgery.records.sweep import SweepReport
from layer_surgery.reporting.compare import ResultRow, comparison_page, first_metrics
from layer_surgery.reporting.made import how_it_was_made
from layer_surgery.reporting.sweep import best_sentence


def sweep_page(report: SweepReport) -> str:
    """Return the page of a sweep."""
    notes = [f"Failed: {point.settings.name}: {point.error}" for point in report.points if point.status == "failed"]
    if report.best is not None:
        sentence = best_sentence(report.best)
        notes.insert(0, sentence[0].upper() + sentence[1:].rstrip(".") + ".")
    made = how_it_was_made(report.base_model, report.calibration, report.provenance, {})
    return comparison_page(list(sweep_rows(report)), notes, made)


def sweep_rows(report: SweepReport, prefix: str = "") -> Iterator[ResultRow]:
    """Yield a row for every point that was measured.

    Args:
        prefix: what the names of the rows begin with, where there are several sweeps.
    """
    for point in report.points:
        if point.result is None or point.plan is None or point.status == "failed":
            continue
        comparison = point.comparison
        yield ResultRow(
            name=f"{prefix}{point.target_layers} whole, keep {point.keep:g}",
            base=str(report.base_model["name"]),
            base_sha256=str(report.base_model.get("sha256", "")),
            method=point.method,
            scorer=point.scorer,
            refit=point.plan.refit,
            layers=len(point.plan.layers),
            removed=[layer.index for layer in point.plan.layers if layer.action == "remove"],
            low_rank=[layer.index for layer in point.plan.low_rank],
            parameters=point.result.parameters,
            parameters_before=_original(report, point.result).parameters,
            perplexity=point.result.perplexity,
            ratio={text: change.ratio for text, change in comparison.perplexity.items()} if comparison else {},
            kl_divergence=comparison.kl_divergence if comparison else {},
            tasks=first_metrics(point.result, comparison),
            decoding=point.decode_speed,
        )


def _original(report: SweepReport, other: EvaluationResult) -> EvaluationResult:
    return report.original or other
