"""Records as self-contained HTML pages: the report of one compression, an evaluation, a ranking."""

from typing import Any, NamedTuple

from layer_surgery.records import EvaluationReport, LayerScores, SurgeryReport
from layer_surgery.reporting.derived import (
    head_of,
    is_joint,
    kept_columns,
    kept_count,
    main_tasks,
    ranked,
    speed_change,
)
from layer_surgery.reporting.figures import healing as healing_plots
from layer_surgery.reporting.figures import layers as layer_plots
from layer_surgery.reporting.figures import quality as quality_plots
from layer_surgery.reporting.formats import ACTION_NAMES, percent_change, with_interval
from layer_surgery.reporting.measurements import measurement_tables, report_tables
from layer_surgery.reporting.provenance import provenance_section
from layer_surgery.reporting.sentences import healing_sentence, how_to_load, refit_sentence, summary
from layer_surgery.reporting.templates import render


class Tile(NamedTuple):
    """A number that is to be seen first."""

    label: str
    value: str
    detail: str


def report_page(report: SurgeryReport, name: str, *, needs_code: bool, note: str = "") -> str:
    """Return the page as HTML, for a result that is called `name`.

    Args:
        needs_code: whether the result loads with `trust_remote_code=True` only.
        note: a sentence before all others.
    """
    linears = kept_columns(report.plan)
    columns, tables = report_tables(report)
    return render(
        "report.html.jinja",
        title=f"{name}: {report.base_model['name']} after layer surgery",
        name=name,
        report=report,
        sentences=[note, *summary(report)] if note else summary(report),
        tiles=tiles(report),
        columns=columns,
        tables=tables,
        layers=layer_rows(report, list(linears)),
        linears=linears.items(),
        layer_plots=list(layer_plots.layer_plots(report)),
        spectra=list(layer_plots.spectra(report.spectra)),
        loss_plots=[*quality_plots.loss(report), quality_plots.costs(report.before, report.after)],
        task_plots=list(quality_plots.tasks(report)),
        refit=refit_sentence(report),
        healing=healing_sentence(report),
        healing_plots=list(healing_plots.curves(report)),
        loading=how_to_load(name, head_of(report.base_model), needs_code=needs_code),
        provenance=provenance_section(report.base_model, report.calibration, report.provenance, _facts(report)),
    )


def evaluation_page(report: EvaluationReport) -> str:
    """Return the page of an evaluation, of one model or of two."""
    names = {of: str(report.provenance.get(of) or of) for of in ("model", "baseline")}
    alone = report.baseline is None
    results = [report.model] if report.baseline is None else [report.baseline, report.model]
    return render(
        "evaluation.html.jinja",
        title=f"{names['model']}, measured by Layer Surgery",
        name=names["model"],
        baseline="" if alone else names["baseline"],
        report=report,
        tables=measurement_tables(results, report.comparison),
        titles=["model"] if alone else ["baseline", "model", "change"],
        models=["model"] if alone else ["baseline", "model"],
    )


def scores_page(scores: LayerScores) -> str:
    """Return the page of a ranking."""
    span = max((abs(value) for value in scores.values), default=0.0) or 1.0
    return render(
        "scores.html.jinja",
        title=f"Layers ranked by {scores.scorer}",
        name=str((scores.provenance or {}).get("model") or ""),
        scores=scores,
        rows=[
            {"goes": row.goes, "layer": row.layer, "value": f"{row.value:.5g}", "per_cent": abs(row.value) / span * 100}
            for row in ranked(scores)
        ],
        together=is_joint(scores),
    )


def tiles(report: SurgeryReport) -> list[Tile]:
    """Return the numbers for the head of the page: size, perplexity, tasks, speed, as far as they were measured."""
    before, after = report.before, report.after
    change = percent_change([float(before.parameters), float(after.parameters)]) or "-"
    found = [Tile("parameters", change, f"{before.parameters:,} → {after.parameters:,}")]
    for name, perplexity in list(report.comparison.perplexity.items())[:2]:
        value, _, interval = with_interval(perplexity.ratio, ".3f").partition(" ")
        found.append(Tile(f"perplexity, {name}", f"x {value}", interval))
    for name in main_tasks(after)[:1]:
        for metric, difference in list(report.comparison.tasks.get(name, {}).items())[:1]:
            value, _, interval = with_interval(difference, "+.3f").partition(" ")
            found.append(Tile(f"{name}, {metric.partition(',')[0]}", value, interval))
    speed = speed_change(before, after)
    if speed is not None:
        label = "decoding speed" if speed.word == "decoding" else speed.word
        found.append(Tile(label, f"x {speed.ratio:.2f}", f"{speed.before:,.1f} → {speed.after:,.1f} tokens/s"))
    return found


def layer_rows(report: SurgeryReport, linears: list[str]) -> list[dict[str, Any]]:
    """Return a row for every layer: its importance, its place in the order of removal, and what was done to it."""
    scores = report.scores
    places = {index: place for place, index in enumerate(scores.removal_order, start=1)} if scores else {}
    return [
        {
            "index": layer.index,
            "importance": f"{scores.values[layer.index]:.4g}" if scores else "",
            "place": places.get(layer.index, ""),
            "action": ACTION_NAMES[layer.action],
            "key": layer.action,
            "ranks": [kept_count(layer, name, report.spectra) or ("whole" if layer.kept else "") for name in linears],
        }
        for layer in report.plan.layers
    ]


def _facts(report: SurgeryReport) -> dict[str, Any]:
    """Return the provenance of a compression, beside that of every run."""
    memory = f"{report.peak_memory_bytes / 1e9:.2f} GB"
    if report.peak_device_memory_bytes is not None:
        memory += f", on the device {report.peak_device_memory_bytes / 1e9:.2f} GB"
    return {
        "method": report.plan.method,
        "scorer": f"{report.scores.scorer} {report.scores.source}" if report.scores else None,
        "refit": report.plan.refit or None,
        "peak memory": memory,
        "seconds": ", ".join(f"{stage.replace('_', ' ')} {value:.1f}" for stage, value in report.timings.items()),
    }
