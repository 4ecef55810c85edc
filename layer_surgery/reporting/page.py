"""The report of one compression as one self-contained HTML page. Computes nothing new."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from layer_surgery.records import LayerPlan, SurgeryReport
from layer_surgery.reporting.figures import layers as layer_plots
from layer_surgery.reporting.figures import quality as quality_plots
from layer_surgery.reporting.formats import percent_change, short_names, with_interval
from layer_surgery.reporting.loading import how_to_load
from layer_surgery.reporting.made import how_it_was_made
from layer_surgery.reporting.measurements import Row, distance_rows, perplexity_rows, size_rows, speed_rows, task_rows
from layer_surgery.reporting.summary import summary
from layer_surgery.reporting.templates import render


class TableRow(NamedTuple):
    """A row of the table of measurements."""

    label: str
    note: str
    values: list[str]
    change: str
    level: str
    """`head`, `row` or `part` (of the row above)."""


class Tile(NamedTuple):
    """A number that is to be seen first."""

    label: str
    value: str
    detail: str


_ACTIONS = {"keep": "whole", "low_rank": "low-rank", "remove": "removed"}


def report_page(report: SurgeryReport, name: str, *, needs_code: bool) -> str:
    """Return the page as HTML, for a result that is called `name`.

    Args:
        needs_code: whether the result loads with `trust_remote_code=True` only.
    """
    return render(
        "report.html.jinja",
        title=f"{name}: {report.base_model['name']} after layer surgery",
        name=name,
        report=report,
        sentences=summary(report),
        tiles=tiles(report),
        tables=tables(report),
        layers=layer_rows(report),
        linears=_linears(report),
        layer_plots=list(layer_plots.layer_plots(report)),
        spectra=list(layer_plots.spectra(report.spectra)),
        loss_plots=[*quality_plots.loss(report), quality_plots.costs(report.before, report.after)],
        task_plots=list(quality_plots.tasks(report)),
        refit=refit_sentence(report),
        loading=how_to_load(name, needs_code=needs_code),
        made=how_it_was_made(report.base_model, report.calibration, report.provenance, _facts(report)),
    )


def tiles(report: SurgeryReport) -> list[Tile]:
    """Return the numbers for the head of the page: size, perplexity, tasks, speed, as far as they were measured."""
    before, after = report.before, report.after
    found = [
        Tile(
            "parameters",
            percent_change([float(before.parameters), float(after.parameters)]) or "-",
            f"{before.parameters:,} → {after.parameters:,}",
        )
    ]
    for name, change in list(report.comparison.perplexity.items())[:2]:
        interval = change.ratio
        found.append(
            Tile(f"perplexity, {name}", f"x {interval.value:.3f}", f"[{interval.low:.3f}, {interval.high:.3f}]")
        )
    names = [name for name, task in after.tasks.items() if task.group] or list(after.tasks)
    for name in names[:1]:
        for metric, interval in list(report.comparison.tasks.get(name, {}).items())[:1]:
            text = with_interval(interval, "+.3f").partition(" ")[2]
            found.append(Tile(f"{name}, {metric.partition(',')[0]}", f"{interval.value:+.3f}", text))
    for old, new in list(zip(before.speed, after.speed, strict=False))[:1]:
        if old.decode_tokens_per_second:
            found.append(
                Tile(
                    "decoding speed",
                    f"x {new.decode_tokens_per_second / old.decode_tokens_per_second:.2f}",
                    f"{old.decode_tokens_per_second:,.1f} → {new.decode_tokens_per_second:,.1f} tokens/s",
                )
            )
    return found


def tables(report: SurgeryReport) -> list[tuple[str, list[TableRow]]]:
    """Return the measurements in groups, each with a heading."""
    results = [report.before, report.after]
    groups: list[tuple[str, Iterable[Row]]] = [
        ("Size and cost", size_rows(results)),
        ("Perplexity", perplexity_rows(results, report.comparison)),
        ("Distance to the original", distance_rows(report.comparison)),
        ("Tasks", task_rows(results, report.comparison)),
        ("Speed", speed_rows(results)),
    ]
    found = [(title, [_table_row(row) for row in rows]) for title, rows in groups]
    return [(title, rows) for title, rows in found if rows]


def _table_row(row: Row) -> TableRow:
    label, values, change = row
    main, _, note = label.partition("\n")
    level = "part" if main.startswith("  ") else "row" if any(values) else "head"
    return TableRow(main.strip(), note.strip().strip("()"), values, change, level)


def layer_rows(report: SurgeryReport) -> list[dict[str, Any]]:
    """Return a row for every layer: its importance, its place in the order of removal, and what was done to it."""
    scores, linears = report.scores, _linears(report)
    places = {index: place for place, index in enumerate(scores.removal_order, start=1)} if scores else {}
    return [
        {
            "index": layer.index,
            "importance": f"{scores.values[layer.index]:.4g}" if scores else "",
            "place": places.get(layer.index, ""),
            "action": _ACTIONS[layer.action],
            "key": layer.action,
            "ranks": [_rank(layer, name) for name, _ in linears],
        }
        for layer in report.plan.layers
    ]


def _linears(report: SurgeryReport) -> list[tuple[str, str]]:
    names = list(dict.fromkeys(name for layer in report.plan.low_rank for name in layer.ranks))
    return list(zip(names, short_names(names), strict=True))


def _rank(layer: LayerPlan, name: str) -> str:
    return str(layer.ranks[name]) if name in layer.ranks else "whole" if layer.action == "low_rank" else ""


def refit_sentence(report: SurgeryReport) -> str:
    """Return what the refit did, or ""."""
    records = report.refit
    if not records:
        return ""
    solved = [record for record in records if record.ridge is not None]
    before, after = (
        sorted(getattr(record, field) for record in records)[len(records) // 2]
        for field in ("error_before", "error_after")
    )
    return (
        f"The refit looked at {len(records)} linears in {len({record.layer for record in records})} layers and "
        f"re-solved {len(solved)} of them; the others were left, because no change was better on held-out windows. "
        f"There the median error, as a fraction of what the original gives, went from {before:.4f} to {after:.4f}."
    )


def _facts(report: SurgeryReport) -> dict[str, Any]:
    """Return where the numbers come from, beside what every run says."""
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
