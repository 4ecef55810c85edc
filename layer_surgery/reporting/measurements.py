"""Measurements of one model, or of two or three side by side, as rows of text for every kind of table."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import NamedTuple

from layer_surgery.records import Comparison, EvaluationResult, SurgeryReport, TaskMetric
from layer_surgery.reporting.formats import percent_change, with_error, with_interval


class Row(NamedTuple):
    """A row of a table of measurements."""

    label: str
    values: list[str]  #: Of each model; the last one is the model after.
    change: str = ""
    note: str = ""  #: Number of tokens or items.
    level: str = "row"  #: `head` (a heading without values), `row`, or `part` of the row above.


def report_tables(report: SurgeryReport) -> tuple[list[str], list[tuple[str, list[Row]]]]:
    """Return the titles of the models of a report, and their measurements as from `measurement_tables`."""
    if report.unhealed is None:
        return ["before", "after"], measurement_tables([report.before, report.after], report.comparison)
    results, middle = [report.before, report.unhealed.result, report.after], report.unhealed.comparison
    titles = ["before surgery", "after surgery", "after healing"]
    return titles, measurement_tables(results, report.comparison, middle)


def measurement_tables(
    results: list[EvaluationResult], comparison: Comparison | None, middle: Comparison | None = None
) -> list[tuple[str, list[Row]]]:
    """Return the measurements of one model or of several in groups, each with a heading; paired intervals in brackets.

    Args:
        results: of the models; changes are those from the first to the last.
        comparison: of the first with the last.
        middle: of the first with the second, where there are three.
    """
    comparisons = [found for found in (middle, comparison or Comparison()) if found is not None]
    groups = {
        "Size and cost": _size(results),
        "Perplexity": _perplexity(results, comparisons[-1]),
        "Distance to the original": _distance(comparisons),
        "Embeddings": _embeddings(results),
        "Tasks": _tasks(results, comparisons[-1]),
        "Speed": _speed(results),
    }
    return [(title, rows) for title, found in groups.items() if (rows := list(found))]


def _size(results: list[EvaluationResult]) -> Iterator[Row]:
    for label, attribute in (
        ("layers", "layers"),
        ("parameters", "parameters"),
        ("bytes of the tensors", "size_bytes"),
        ("KV cache bytes/token", "kv_cache_bytes_per_token"),
        ("FLOPs/token", "flops_per_token"),
    ):
        values = [getattr(result, attribute) for result in results]
        if attribute == "kv_cache_bytes_per_token" and not any(values) and all(r.flops_per_token for r in results):
            continue  # the model was run, and keeps no cache
        known = [float(value) for value in values if value is not None]
        change = percent_change(_ends(known)) if len(known) == len(values) else ""
        yield Row(label, ["-" if value is None else f"{value:,}" for value in values], change)


def _perplexity(results: list[EvaluationResult], comparison: Comparison) -> Iterator[Row]:
    for name in dict.fromkeys(name for result in results for name in result.perplexity):
        found = [result.perplexity.get(name) for result in results]
        tokens = next(value.tokens for value in found if value is not None)
        change = ""
        if name in comparison.perplexity:
            change = f"x {with_interval(comparison.perplexity[name].ratio, '.3f')}"
        elif len(found) > 1 and found[0] is not None and found[-1] is not None:
            change = f"x {found[-1].value / found[0].value:.3f}"
        values = ["-" if value is None else with_error(value.value, value.stderr) for value in found]
        yield Row(f"perplexity, {name}", values, change, f"{tokens:,} tokens")


def _distance(comparisons: list[Comparison]) -> Iterator[Row]:
    for name in dict.fromkeys(name for comparison in comparisons for name in comparison.kl_divergence):
        found = [comparison.kl_divergence.get(name) for comparison in comparisons]
        agreements = [comparison.top1_agreement.get(name) for comparison in comparisons]
        means = ["-" if kl is None else with_error(kl.mean, kl.stderr, ".4f") for kl in found]
        yield Row(f"KL, {name} (nats)", ["", *means])
        yield Row("99.9th percentile", ["", *("-" if kl is None else f"{kl.p99_9:.3f}" for kl in found)], level="part")
        values = ["-" if top is None else with_error(top.value, top.stderr, ".4f") for top in agreements]
        yield Row(f"top-1, {name}", ["", *values])


def _embeddings(results: list[EvaluationResult]) -> Iterator[Row]:
    """Yield what vectors are worth at each size and in each way to store them, beside the model before."""
    for name in dict.fromkeys(name for result in results for name in result.embedding):
        found = [result.embedding.get(name) for result in results]
        some = next(each for each in found if each is not None)
        yield Row(
            f"similarities kept, {name} (Spearman)", [""] * len(results), note=f"{some.texts:,} texts", level="head"
        )
        for place, point in enumerate(some.points):
            label = f"{point.dimensions} numbers, {point.storage}, {point.bytes_per_vector:,} bytes"
            values = ["-" if each is None else f"{each.points[place].similarity.value:.4f}" for each in found]
            yield Row(label, values, level="part")
        for retrieval, of_original in some.original_ndcg10.items():
            values = [f"{of_original.value:.4f}" if len(results) > 1 else ""] if found[0] is None else []
            values += [f"{each.points[0].ndcg10[retrieval].value:.4f}" for each in found if each is not None]
            last = found[-1]
            change = (
                with_interval(last.ndcg10_change[retrieval], "+.4f") if last is not None and len(results) > 1 else ""
            )
            yield Row(f"nDCG@10, bundled {retrieval}s", values, change)
            both = [None if each is None or each.asymmetric is None else each.asymmetric for each in found]
            if len(results) > 1 and any(both):
                cells = ["-" if each is None else f"{each.ndcg10[retrieval].value:.4f}" for each in both]
                yield Row("queries by it, documents by the original", cells, level="part")


def _tasks(results: list[EvaluationResult], comparison: Comparison) -> Iterator[Row]:
    for name in dict.fromkeys(name for result in results for name in result.tasks):
        found = [result.tasks.get(name) for result in results]
        some = next(task for task in found if task is not None)
        for metric in some.metrics:
            values = [None if task is None else task.metrics.get(metric) for task in found]
            cells = ["-" if value is None else with_error(value.value, value.stderr, ".4f") for value in values]
            interval = comparison.tasks.get(name, {}).get(metric)
            change = with_interval(interval, "+.4f") if interval is not None else _difference(values)
            yield Row(f"{name}, {metric}", cells, change, f"{some.items:,} items")


def _difference(values: list[TaskMetric | None]) -> str:
    """Return the difference of a metric whose items are not known, without an interval."""
    first, last = values[0], values[-1]
    return f"{last.value - first.value:+.4f}" if len(values) > 1 and first is not None and last is not None else ""


def _speed(results: list[EvaluationResult]) -> Iterator[Row]:
    measured = [result for result in results if result.speed]  # not of a model from before healing
    for points in zip_longest(*(result.speed for result in measured)):
        if None in points:
            continue
        gap = len(results) - len(points) if len(points) == 2 else 0
        setting = f"{points[0].batch_size} x {points[0].prompt_tokens} tokens"
        yield Row(f"speed, {setting}", [""] * len(results), level="head")
        generates = any(point.new_tokens for point in points)
        for label, attribute, factor in (
            ("prefill, tokens/s" if generates else "tokens/s", "prefill_tokens_per_second", 1.0),
            ("decoding, tokens/s", "decode_tokens_per_second", 1.0),
            ("first token, ms" if generates else "a batch, ms", "time_to_first_token_seconds", 1e3),
            ("a token, median, ms", "latency_p50_seconds", 1e3),
            ("a token, 95th percentile, ms", "latency_p95_seconds", 1e3),
            ("peak memory, MB", "peak_memory_bytes", 1e-6),
        ):
            known = [value for point in points if (value := getattr(point, attribute)) is not None]
            if len(known) < len(points):
                continue
            values = [value * factor for value in known]
            cells = [f"{value:,.1f}" for value in values]
            yield Row(label, [*cells[:1], *["-"] * gap, *cells[1:]], percent_change(values), level="part")


def _ends(values: list[float]) -> list[float]:
    """Return the first and the last of several values."""
    return [values[0], values[-1]] if len(values) > 2 else values
