"""A sweep as a table: rows of text, Markdown, and CSV with a column for every number."""

import csv
import io
from typing import Any

from layer_surgery.checkpoint.heads import CAUSAL_LM, EMBEDDING
from layer_surgery.records import EvaluationResult
from layer_surgery.records.sweep import FRONTS, SweepPoint, SweepReport
from layer_surgery.reporting.derived import head_of
from layer_surgery.reporting.formats import with_interval
from layer_surgery.reporting.sentences import best_note, failed_points

#: Columns of words; the others hold numbers.
TEXT_COLUMNS = ("method", "scorer", "front")
_LEGEND = (
    "front: no other point is at least as good in both {quality} and size (or speed), and better in one; of several "
    "{sets} the mean counts (of ratios the geometric one)."
)
_NUMBERS = ("parameters", "predicted_loss_rise", "perplexity_ratio", "prefill_speed", "decode_speed")
_FRONT_NAMES = {"parameters": "size", "prefill_speed": "prefill", "decode_speed": "decoding"}


def legend(report: SweepReport) -> str:
    """Return what the table's column `front` means."""
    head = head_of(report.base_model)
    of_texts = head in (CAUSAL_LM, EMBEDDING)
    return _LEGEND.format(
        quality="perplexity" if head is CAUSAL_LM else "loss", sets="texts" if of_texts else "sets of examples"
    )


def sweep_table(report: SweepReport) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows; the first row is the original. Columns in which nothing was measured are left out."""
    columns: dict[str, list[str]] = {}

    def add(title: str, original: str, cells: list[str]) -> None:
        if any(cells):
            columns[title] = [original, *cells]

    points, model, original = report.points, report.base_model, report.original
    causal = head_of(model) is CAUSAL_LM
    add("layers", str(model["layers"]), [str(point.target_layers) for point in points])
    add("keep", "", [f"{point.keep:g}" for point in points])
    add("method", "original", [point.method + (" + refit" if point.refit else "") for point in points])
    add("scorer", "", [point.scorer for point in points])
    add("parameters", f"{model['parameters']:,}", [_parameters(point, model["parameters"]) for point in points])
    for text in report.evaluation if causal else ():
        name = text["name"]
        of_text = "" if len(report.evaluation) == 1 else f", {name}"
        add(f"perplexity{of_text}", _perplexity(original, name), [_perplexity(point.result, name) for point in points])
        add(f"ratio{of_text}", "1", [_ratio(point, name) for point in points])
    add("KL", "0", [_mean_of(point, "kl_divergence", "mean") for point in points])
    add("top-1", "1", [_mean_of(point, "top1_agreement", "value") for point in points])
    add("loss ratio", "1", ["" if point.loss_ratio is None else f"{point.loss_ratio:.3f}" for point in points])
    losses = [point.embedding_loss for point in points]
    add("embedding loss", "0", ["" if loss is None else f"{loss:.4f}" for loss in losses])
    add("similarity", "1", [_similarity(point) for point in points])
    for task in _tasks(report) if not any(losses) else ():
        add(task, _task(original, task), [_task(point.result, task) for point in points])
    add("prefill", "1 x", [_times(point.prefill_speed) for point in points])
    add("decoding", "1 x", [_times(point.decode_speed) for point in points])
    add("front", "", [_front(point) for point in points])
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def markdown_text(report: SweepReport) -> str:
    """Return the table as Markdown, with the model and the texts that it is about."""
    titles, rows = sweep_table(report)
    model, table = report.base_model, [titles, ["---"] * len(titles), *rows]
    texts = "; ".join(f"{text['name']}: {text['predicted_tokens']:,} tokens predicted" for text in report.evaluation)
    lines = [
        f"# Sweep of {model['name']}",
        "",
        f"{len(report.points)} points; model sha256 {model['sha256'][:12]}; {texts}",
        "",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table),
        "",
        legend(report),
    ]
    notes = [*(f"Failed: {line}" for line in failed_points(report)), *best_note(report)]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def csv_text(report: SweepReport) -> str:
    """Return one line for each point and a column for every number; "" where a point has none."""
    rows = [_csv_row(point) for point in report.points]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    target = io.StringIO()
    writer = csv.DictWriter(target, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def _csv_row(point: SweepPoint) -> dict[str, Any]:
    row: dict[str, Any] = {
        **vars(point.settings),
        "status": point.status,
        "layers": " ".join(map(str, point.layers)),
        **{_quality(point, name): getattr(point, _quality(point, name)) for name in _NUMBERS},
        **{f"front_{front}": front in point.fronts for front in FRONTS},
        "seconds": point.seconds,
        "error": point.error,
    }
    if point.result is not None:
        row |= {"size_bytes": point.result.size_bytes, "flops_per_token": point.result.flops_per_token}
        for name, perplexity in point.result.perplexity.items():
            row |= {f"perplexity: {name}": perplexity.value, f"perplexity stderr: {name}": perplexity.stderr}
    if point.comparison is not None:
        for name, change in point.comparison.perplexity.items():
            row |= {f"ratio: {name}": change.ratio.value}
            row |= {f"ratio low: {name}": change.ratio.low, f"ratio high: {name}": change.ratio.high}
        for name, divergence in point.comparison.kl_divergence.items():
            row |= {f"kl_divergence: {name}": divergence.mean}
        for name, agreement in point.comparison.top1_agreement.items():
            row |= {f"top1_agreement: {name}": agreement.value}
    if point.result is not None:
        for task, found in point.result.tasks.items():
            for metric, value in found.metrics.items():
                row |= {f"{task}, {metric}": value.value, f"{task}, {metric} stderr": value.stderr}
        for speed in point.result.speed:
            shape = f"{speed.batch_size} x {speed.prompt_tokens}"
            row |= {f"prefill tokens/s: {shape}": speed.prefill_tokens_per_second}
            row |= {f"decode tokens/s: {shape}": speed.decode_tokens_per_second or ""}
            row |= {f"peak memory bytes: {shape}": speed.peak_memory_bytes}
    return row


def _quality(point: SweepPoint, name: str) -> str:
    """Return the name of a number, with that of the loss for perplexity where there is none."""
    if name != "perplexity_ratio":
        return name
    return next((each for each in ("loss_ratio", "embedding_loss") if getattr(point, each) is not None), name)


def _parameters(point: SweepPoint, whole: int) -> str:
    return "" if point.parameters is None else f"{point.parameters:,} ({100 * point.parameters / whole:.1f} %)"


def _perplexity(result: EvaluationResult | None, name: str) -> str:
    return f"{result.perplexity[name].value:,.2f}" if result is not None and name in result.perplexity else ""


def _ratio(point: SweepPoint, name: str) -> str:
    change = point.comparison.perplexity.get(name) if point.comparison is not None else None
    return "" if change is None else with_interval(change.ratio, ".3f")


def _similarity(point: SweepPoint) -> str:
    """Return how far the model finds the same texts alike as the original; of several sets the mean."""
    found = point.result.embedding.values() if point.result is not None else ()
    values = [each.points[0].similarity.value for each in found]
    return f"{sum(values) / len(values):.4f}" if values else ""


def _mean_of(point: SweepPoint, quantity: str, field: str) -> str:
    found = getattr(point.comparison, quantity, {})
    return f"{sum(getattr(each, field) for each in found.values()) / len(found):.4f}" if found else ""


def _tasks(report: SweepReport) -> list[str]:
    """Return the groups of tasks that were run, or the tasks where there are no groups."""
    results = [report.original, *(point.result for point in report.points)]
    found = {name: task.group for result in results if result is not None for name, task in result.tasks.items()}
    return [name for name, group in found.items() if group] or list(found)


def _task(result: EvaluationResult | None, name: str) -> str:
    if result is None or name not in result.tasks or not result.tasks[name].metrics:
        return ""
    return f"{next(iter(result.tasks[name].metrics.values())).value:.4f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def _front(point: SweepPoint) -> str:
    return "failed" if point.status == "failed" else ", ".join(_FRONT_NAMES[front] for front in point.fronts)
